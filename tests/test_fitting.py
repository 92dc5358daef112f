"""Candidates and their prices, against the definitions computed the slow way."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES, adapter_flops
from rana_compile.fitting import (
    CROSS_TERMS,
    Evidence,
    dense_candidate,
    gated_at,
    gated_candidates,
    neuron_at,
    neuron_candidates,
    output_basis_of,
    quantiles,
    rank_candidates,
)
from rana_compile.flops import dense_flops
from rana_compile.recipes import best_rank
from rana_compile.statistics import Sample
from rana_compile.types import ConfigError, Site

ROWS = 400


def evidence_of(d_in: int, *d_outs: int, gradients: bool = True, decay: float = 0.0) -> Evidence:
    d_out = sum(d_outs)
    spectrum = torch.exp(-decay * torch.arange(d_in))
    mixing = torch.linalg.qr(torch.randn(d_in, d_in))[0]
    draw = lambda: torch.randn(ROWS, d_in) * spectrum @ mixing  # noqa: E731
    weight, other = torch.randn(d_out, d_in), draw()
    g = torch.randn(ROWS, d_out) / 10
    parts = list(weight.split(d_outs))
    site = Site("s", "stacked", tuple(map(str, d_outs)), d_in, d_outs)
    sample = Sample(ROWS, len(d_outs), 0)
    taken, slots = sample.offer(draw())
    for i, (part, slope) in enumerate(zip(parts, g.split(d_outs, 1), strict=True)):
        if gradients:
            sample.offer_gradient(i, slope @ part, taken, slots)
    return Evidence(site, parts, sample, other.t() @ other / ROWS)


def price_of(effect: Tensor, dropped: Tensor) -> float:
    lost = effect * dropped
    return 0.5 * float(CROSS_TERMS * lost.sum(1).square().mean() + (1 - CROSS_TERMS) * lost.square().sum(1).mean())


@pytest.mark.parametrize("importance", ["magnitude", "column", "loss", "token"])
def test_neuron_prices_are_the_definition(importance: str) -> None:
    """A mask for each linear of a stack: costs and prices add up, each linear's by the definition."""
    e = evidence_of(16, 24, 8)
    candidates = list(neuron_candidates(e, importance, (0.25, 0.5, 0.9)))
    assert any(c.live[0] != pytest.approx(c.live[1], abs=1) for c in candidates)
    for candidate in candidates:
        masks = [FAMILIES["neuron"].mask(i, e.site, e.x, [], [], candidate.tensors) for i in range(len(e.weights))]
        dropped = [mask.z.abs() < mask.threshold for mask in masks]
        probed = len(candidate.tensors["probe"]) > 0  # priced with probes that were fitted on other rows
        price = sum(price_of(e.part(i).u * e.x, d) for i, d in enumerate(dropped))
        assert candidate.live == pytest.approx([float((~d).sum()) / ROWS for d in dropped], abs=0.5 if probed else 0.1)
        assert candidate.option.price == pytest.approx(price, rel=0.2 if probed else 0.02)
        cost = adapter_flops(FAMILIES["neuron"], e.site, candidate.live, candidate.tensors)
        assert candidate.option.cost == pytest.approx(cost)


def test_neuron_at_keeps_one_share_of_every_linear() -> None:
    e = evidence_of(16, 24, 8)
    assert neuron_at(e, 0.5).live == pytest.approx((8, 8), abs=0.1)
    assert neuron_at(e, 1.0).family == "dense"


def test_unknown_importance_is_an_error() -> None:
    with pytest.raises(ConfigError, match="unknown importance 'size'; known: magnitude, column, loss"):
        list(neuron_candidates(evidence_of(4, 5), "size"))


def mlp_evidence() -> tuple[Evidence, Evidence]:
    """gate_up and down of one MLP, h = silu(gate) * up."""
    d, h = 12, 20
    weights = [torch.randn(h, d), torch.randn(h, d)]
    site = Site("up", "gate_up", ("g", "u"), d, (h, h), "mlp", activation="silu")
    up, down = Sample(ROWS, 2, 0), Sample(ROWS, 1, 0)
    x = torch.randn(ROWS, d).bfloat16().float()
    taken, slots = up.offer(x)
    for i in (0, 1):
        up.offer_gradient(i, torch.randn(ROWS, d), taken, slots)
    hidden = torch.nn.functional.silu(x @ weights[0].t()) * (x @ weights[1].t())
    taken, slots = down.offer(hidden)
    down.offer_gradient(0, torch.randn(ROWS, h) * torch.linspace(0.1, 2, h), taken, slots)
    down_site = Site("down", "down", ("d",), h, (d,), "mlp")
    return Evidence(site, weights, up), Evidence(down_site, [torch.randn(d, h)], down)


def test_gated_prices_are_the_definition() -> None:
    """Dropping a row of up costs what losing its hidden coordinate costs, unless down drops it anyway."""
    up, down = mlp_evidence()
    e = up.part(0)
    activated = torch.nn.functional.silu(up.x @ up.weights[0].t())
    kept_by_down = neuron_at(down, 0.5)
    for choice in (dense_candidate(down), kept_by_down):
        read = down.x.abs() >= choice.tensors.get("threshold", torch.zeros(1))
        candidates = list(gated_candidates(up, down, choice))
        assert candidates
        for c in candidates:
            inputs = up.x.abs() < c.tensors["threshold"][0]
            rows = activated.abs() < c.tensors["gate_threshold"]
            price = price_of(e.u * up.x, inputs) + price_of(down.u * down.x * read, rows)
            assert c.option.price == pytest.approx(price, rel=0.02)
            assert c.live == pytest.approx((float((~inputs).sum()) / ROWS, float((~rows).sum()) / ROWS), abs=0.1)
            assert c.option.cost == pytest.approx(adapter_flops(FAMILIES["gated"], up.site, c.live, c.tensors))


def test_gated_needs_an_activation_and_the_same_tokens() -> None:
    up, down = mlp_evidence()
    unknown = replace(up, site=replace(up.site, activation=None))
    assert not list(gated_candidates(unknown, down, dense_candidate(down)))
    down.sample.offer(torch.randn(3, 20))
    assert not list(gated_candidates(up, down, dense_candidate(down)))


def test_cats_keeps_the_share_of_rows() -> None:
    up, down = mlp_evidence()
    assert gated_at(up, down, 0.25).live == pytest.approx((12, 5), abs=0.1)


@pytest.mark.parametrize("seen", [ROWS, 5], ids=["all directions", "fewer directions than inputs"])
def test_rank_prices_are_the_definition(seen: int) -> None:
    """Dropped: coordinates below their thresholds, those cut off, and what lies outside of a basis of few tokens."""
    e = evidence_of(12, 48, decay=0.1)
    e = replace(e, moment=e.x[:seen].t() @ e.x[:seen])
    whole, _ = output_basis_of(e)
    assert (whole.shape[1] < 12) == (seen < 12)
    g = e.u @ torch.linalg.pinv(e.weight)  # as far as it acts through W
    y = e.x @ e.weight.t()
    effect = (g @ whole) * (y @ whole)
    rest = (g * y).sum(1, keepdim=True) - effect.sum(1, keepdim=True)
    fitted = list(rank_candidates(e))
    assert {c.family for c in fitted} == {"rank", "low_rank"}
    for c in fitted:
        r = c.tensors["output_basis"].shape[1]
        kept = (y @ whole[:, :r]).abs() >= c.tensors.get("threshold", torch.zeros(1))
        dropped = torch.ones(ROWS, whole.shape[1] + 1)
        dropped[:, :r] = (~kept).float()
        price = price_of(torch.cat([effect, rest], 1), dropped)
        assert c.option.price == pytest.approx(price, rel=0.05, abs=1e-9)
        assert c.option.cost < dense_flops(e.site)
        if c.family == "rank":
            assert c.live == pytest.approx((float(kept.sum()) / ROWS,), abs=0.1)


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
    apart = [float((e.u * e.x * (e.x.abs() < c.tensors["threshold"][0])).square().sum()) for c in candidates]
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
    assert chosen.live == pytest.approx((float(kept),), abs=0.5)
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
