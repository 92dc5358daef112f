"""Candidates and their prices, against the definitions computed the slow way."""

import pytest
import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES
from rana_compile.fitting import (
    CROSS_TERMS,
    Evidence,
    dense_candidate,
    neuron_candidates,
    output_basis_of,
    quantiles,
    rank_candidates,
)
from rana_compile.flops import dense_flops
from rana_compile.recipes import best_rank
from rana_compile.types import ConfigError, Site

ROWS = 400


def evidence_of(d_in: int, d_out: int, gradients: bool = True, decay: float = 0.0) -> Evidence:
    spectrum = torch.exp(-decay * torch.arange(d_in))
    mixing = torch.linalg.qr(torch.randn(d_in, d_in))[0]
    draw = lambda: torch.randn(ROWS, d_in) * spectrum @ mixing  # noqa: E731
    weight, other = torch.randn(d_out, d_in), draw()
    g = torch.randn(ROWS, d_out) / 10
    site = Site("s", "linear", ("w",), d_in, (d_out,))
    return Evidence(site, weight, draw(), g @ weight if gradients else None, other.t() @ other / ROWS)


def price_of(effect: Tensor, dropped: Tensor) -> float:
    lost = effect * dropped
    return 0.5 * float(CROSS_TERMS * lost.sum(1).square().mean() + (1 - CROSS_TERMS) * lost.square().sum(1).mean())


@pytest.mark.parametrize("importance", ["magnitude", "column", "loss"])
def test_neuron_prices_are_the_definition(importance: str) -> None:
    e = evidence_of(16, 24)
    for candidate in neuron_candidates(e, importance, (0.25, 0.5, 0.9)):
        dropped = e.x.abs() < candidate.tensors["threshold"]
        assert candidate.live == pytest.approx(float((~dropped).sum()) / ROWS, abs=0.1)
        assert candidate.option.price == pytest.approx(price_of(e.u * e.x, dropped), rel=0.02)
        assert candidate.option.cost == FAMILIES["neuron"].flops(e.site, candidate.live, candidate.tensors)


def test_rank_prices_are_the_definition() -> None:
    e = evidence_of(12, 48, decay=0.3)
    fitted = list(rank_candidates(e))
    assert {c.family for c in fitted} == {"rank", "low_rank"}
    for c in fitted:
        basis = c.tensors["output_basis"]
        z = e.x @ e.weight.t() @ basis
        kept = z.abs() >= c.tensors.get("threshold", torch.zeros(1))
        error = (e.x @ e.weight.t()) - (z * kept) @ basis.t()
        g = e.u @ torch.linalg.pinv(e.weight)  # as far as it acts through W
        joint = 0.5 * float((g * error).sum(1).square().mean())
        if CROSS_TERMS == 1.0:
            assert c.option.price == pytest.approx(joint, rel=0.05, abs=1e-9)
        assert c.option.cost < dense_flops(e.site)
        assert c.live == pytest.approx(float(kept.sum()) / ROWS, abs=0.1)


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 30), (30, 12)])
def test_basis_is_orthonormal_and_holds_the_energy(d_in: int, d_out: int) -> None:
    e = evidence_of(d_in, d_out, decay=0.1)
    basis, pull = output_basis_of(e)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(basis, e.weight @ pull, rtol=0, atol=1e-3)
    y = e.x @ e.weight.t()
    assert float((y @ basis).square().sum()) == pytest.approx(float(y.square().sum()), rel=1e-4)
    exact = torch.linalg.svd(e.weight @ torch.linalg.cholesky(e.moment.double()).float())[0]
    overlap = (exact[:, :3].t() @ basis[:, :3]).svd()[1]
    assert overlap.min() > 0.99


def test_more_live_coordinates_never_cost_more_loss_apart() -> None:
    e = evidence_of(16, 24)
    candidates = sorted(neuron_candidates(e), key=lambda c: c.live)
    apart = [float((e.u * e.x * (e.x.abs() < c.tensors["threshold"])).square().sum()) for c in candidates]
    assert apart == sorted(apart, reverse=True)


def test_without_gradients_the_price_is_relative_squared_error() -> None:
    e = evidence_of(16, 24, gradients=False)
    prices = [c.option.price for c in neuron_candidates(e, "column")]
    assert all(0 <= p <= 1 for p in prices)


def test_dense_is_free_of_loss() -> None:
    assert dense_candidate(evidence_of(4, 5)).option.price == 0


def test_quantiles_leave_the_density() -> None:
    scores = torch.rand(100, 50)
    for density, level in zip((0.1, 0.5, 1.0), quantiles(scores, (0.1, 0.5, 1.0)), strict=True):
        assert float((scores >= level).float().mean()) == pytest.approx(density, abs=0.001)


def test_papers_line_search_keeps_the_most_energy() -> None:
    """Algorithm 1: no other rank on its grid keeps more energy at the same cost."""
    e = evidence_of(24, 96, decay=0.15)
    ratio = 0.6
    chosen = best_rank(e, ratio)
    basis, _ = output_basis_of(e)
    energy = (e.x @ e.weight.t() @ basis).square()
    kept = (energy[:, : chosen.tensors["output_basis"].shape[1]] >= chosen.tensors["threshold"][0] ** 2).sum() / ROWS
    assert chosen.option.cost <= 1.02 * ratio * dense_flops(e.site)
    assert chosen.live == pytest.approx(float(kept), abs=0.5)
    for r in (10, 20, 24):
        live = min((ratio * 24 * 96 - r * 24) / 96, r)
        if live < 1:
            continue
        level = quantiles(energy[:, :r], (live / r,))[0] if live < r else 0.0
        retained = float((energy[:, :r] * (energy[:, :r] >= level)).sum() / energy.sum())
        assert 1 - chosen.option.price >= retained - 1e-6


def test_papers_rank_adapter_needs_room_for_its_first_factor() -> None:
    with pytest.raises(ConfigError, match="no rank adapter fits"):
        best_rank(evidence_of(64, 64), 0.1)
