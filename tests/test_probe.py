"""Sensitivities of tokens: found where they are, not where there is nothing to find, and honest on rows not seen."""

import pytest
import torch
from torch import Tensor

from rana_compile.adapters.base import LIMIT, sensitivity
from rana_compile.probe import LEAST_ROWS, Tokens, fit_probe, held_out_sensitivity

ROWS, D = 1200, 24


def tokens(slope: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [rows, d], what the loss really makes of them [rows], and gradients [rows, 2·d] of that size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, D, generator=generator) * torch.linspace(0.1, 3, D) + 0.5  # neither centred nor of one scale
    truth = (x @ slope).exp()
    return x, truth, torch.randn(ROWS, 2 * D, generator=generator) * truth[:, None] * torch.linspace(1e-3, 10, 2 * D)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.log(), b.log()]))[0, 1])


def test_probe_finds_what_the_gradients_follow() -> None:
    slope = torch.zeros(D)
    slope[[3, 10, 20]] = torch.tensor([0.6, -0.3, 0.2])
    x, truth, u = tokens(slope)
    found = Tokens.of(x, u)
    assert found is not None
    fresh, fresh_truth, _ = tokens(slope, seed=1)
    assert correlation(sensitivity(fresh, found.probe[None])[:, 0], fresh_truth) > 0.97
    assert correlation(found.predicted, truth) > 0.97
    assert found.predicted.log().mean() == pytest.approx(0, abs=0.1)  # relative to the usual token


def test_nothing_to_find_predicts_next_to_nothing() -> None:
    x, _, u = tokens(torch.zeros(D))
    assert float(held_out_sensitivity(x, u.square().mean(1)).log().std()) < 0.1


def test_predictions_come_from_the_other_half() -> None:
    """A row's own gradient says nothing about what is predicted for it."""
    x, _, u = tokens(torch.zeros(D))
    power = u.square().mean(1)
    changed = power.clone()
    changed[: ROWS // 2] *= torch.rand(ROWS // 2) * 100
    a, b = held_out_sensitivity(x, power), held_out_sensitivity(x, changed)
    assert torch.equal(a[: ROWS // 2], b[: ROWS // 2])
    assert not torch.allclose(a[ROWS // 2 :], b[ROWS // 2 :])


@pytest.mark.parametrize("break_it", ["dead input", "no gradient at all", "one huge row"])
def test_odd_data_stays_finite(break_it: str) -> None:
    x, _, u = tokens(torch.zeros(D))
    if break_it == "dead input":
        x[:, 5] = 1.0
    elif break_it == "no gradient at all":
        u.zero_()
    else:
        u[7] *= 1e8
    probe = fit_probe(x, u.square().mean(1))
    s = sensitivity(x, probe[None])
    assert torch.isfinite(probe).all()
    assert float(s.log().abs().max()) <= LIMIT + 1e-5


def test_too_few_rows_or_no_gradients_have_no_probe() -> None:
    x, _, u = tokens(torch.zeros(D))
    assert Tokens.of(x[: LEAST_ROWS - 1], u[: LEAST_ROWS - 1]) is None
    assert Tokens.of(x, None) is None
