"""Every family against the formula in float64, its kernels against its plain form, and its cost by hand."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from support import formula
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors, adapter_flops
from rana_compile.kernels import ops
from rana_compile.types import Site

D_OUTS = (7, 5, 12)
D_IN = 19
H = 11
STACK = Site("s", "stacked", ("a", "b", "c"), D_IN, D_OUTS)
GATE_UP = Site("s", "gate_up", ("a", "b"), D_IN, (H, H), activation="silu")
SITES = {"neuron": STACK, "rank": STACK, "low_rank": STACK, "gated": GATE_UP}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the dtype's eps


def weights_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor | None]]:
    sizes = SITES[family].d_outs
    weights = [torch.randn(n, D_IN) for n in sizes]
    biases: list[Tensor | None] = [torch.randn(n) if i != 1 else None for i, n in enumerate(sizes)]
    return [w.to(dtype) for w in weights], [None if b is None else b.to(dtype) for b in biases]


def stored(family: str, weights: list[Tensor], threshold: float) -> Tensors:
    if family == "gated":
        thresholds = {"threshold": torch.full((1, D_IN), threshold), "gate_threshold": torch.full((H,), threshold)}
        return thresholds | {"probe": probe(2)}
    if family == "neuron":  # a mask for each linear, all different
        threshold_of_each = torch.full((len(D_OUTS), D_IN), threshold) * torch.tensor([[1.0], [0.5], [1.5]])
        return {"threshold": threshold_of_each, "probe": probe(len(D_OUTS))}
    basis = torch.linalg.svd(torch.cat(weights).double(), full_matrices=False)[0][:, :9].to(torch.float32)
    every = {"output_basis": basis.contiguous(), "threshold": torch.full((9,), threshold)}
    return {k: every[k] for k in FAMILIES[family].stored}


def probe(masks: int) -> Tensor:
    """Slopes and offset for each mask, alike in every call; the last mask's predictions pass the limit."""
    values = torch.randn(masks, D_IN + 1, generator=torch.Generator().manual_seed(1)) / 4
    return values * torch.tensor([1.0] * (masks - 1) + [8.0])[:, None]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1e9], ids=["all live", "some", "none"])
def test_plain_form_is_the_formula(family: str, threshold: float) -> None:
    weights, biases = weights_of(family)
    tensors = stored(family, weights, threshold)
    x = torch.randn(4, 3, D_IN)
    full = tensors | FAMILIES[family].derive(weights, tensors)
    y = torch.cat(FAMILIES[family].forward(SITES[family], x, weights, biases, full), -1)
    torch.testing.assert_close(
        y.double(), formula(family, SITES[family], x, weights, biases, tensors), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_compute_the_plain_form(family: str, dtype: torch.dtype) -> None:
    ops.load("cpu")
    weights, biases = weights_of(family, dtype)
    tensors = stored(family, weights, 0.7)
    x = torch.randn(1, 1, D_IN).to(dtype)
    full = tensors | FAMILIES[family].derive(weights, tensors)
    plain = torch.cat(FAMILIES[family].forward(SITES[family], x, weights, biases, full), -1)
    bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    fast = FAMILIES[family].decode(SITES[family], x, FAMILIES[family].pack(SITES[family], weights, tensors), bias)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, plain, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["weight_t", "batched_weight_t"])
@pytest.mark.parametrize("rows", [(6,), (3, 2)])
@pytest.mark.parametrize("d_outs", [D_OUTS, (7, 7, 3), (3, 7, 7), (5, 5), (4, 4, 4)])
def test_parts_computed_together_are_the_plain_form(name: str, rows: tuple[int, ...], d_outs: tuple[int, ...]) -> None:
    site = dataclasses.replace(STACK, d_outs=d_outs, weights=STACK.weights[: len(d_outs)])
    weights = [torch.randn(n, D_IN) for n in d_outs]
    biases = [torch.randn(d_outs[0]), *[None] * (len(d_outs) - 1)]
    family, x = FAMILIES["neuron"], torch.randn(*rows, D_IN)
    tensors = {k: t[: len(d_outs)] for k, t in stored("neuron", weights, 0.6).items()}
    plain = family.forward(site, x, weights, biases, tensors)
    together = family.forward(site, x, weights, biases, tensors | {name: torch.cat(weights).t().contiguous()})
    assert len(plain) == len(together) == len(d_outs)
    for one, other in zip(plain, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["weight_t", "batched_weight_t"])
def test_a_gate_and_its_up_computed_together_are_the_plain_form(name: str) -> None:
    weights, biases = weights_of("gated")
    family, x, tensors = FAMILIES["gated"], torch.randn(3, 2, D_IN), stored("gated", weights, 0.6)
    plain = family.forward(GATE_UP, x, weights, biases, tensors)
    stacked = tensors | {name: torch.cat(weights).t().contiguous()}
    together = family.forward(GATE_UP, x, weights, biases, stacked)
    for one, other in zip(plain, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_can_be_had_from_the_layouts_that_hold_them(family: str) -> None:
    weights, _ = weights_of(family)
    packed = FAMILIES[family].pack(SITES[family], weights, stored(family, weights, 0.7))
    views = FAMILIES[family].unpacked(SITES[family], packed)
    storages = {t.untyped_storage().data_ptr() for t in packed.values()}
    assert len(views) == (len(weights) if family in ("neuron", "gated") else 0)
    for view, weight in zip(views, weights, strict=False):
        assert torch.equal(view, weight) and view.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("family", ["rank", "low_rank"])
def test_what_a_graph_computes_with_needs_no_conversion(family: str) -> None:
    weights, _ = weights_of(family, torch.bfloat16)
    derived = FAMILIES[family].derive(weights, stored(family, [w.float() for w in weights], 0.5))
    assert {name: t.dtype for name, t in derived.items()} == dict.fromkeys(("basis", "output_basis"), torch.bfloat16)


@pytest.mark.parametrize("family", ["neuron", "rank", "gated"])
def test_nothing_dropped_is_dense(family: str) -> None:
    weights, biases = weights_of(family)
    tensors = stored(family, weights, 0.0)
    if family == "rank":
        basis = torch.linalg.svd(torch.cat(weights), full_matrices=False)[0]
        tensors = {"output_basis": basis, "threshold": torch.zeros(basis.shape[1])}
    x = torch.randn(4, D_IN)
    full = tensors | FAMILIES[family].derive(weights, tensors)
    outputs = FAMILIES[family].forward(SITES[family], x, weights, biases, full)
    for y, w, b in zip(outputs, weights, biases, strict=True):
        torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "live", "expected"),
    [
        ("neuron", (10.0, 4.0, 1.0), 2 * (10 * 7 + 4 * 5 + 1 * 12) + 2 * 3 * (D_IN + 1)),
        ("gated", (10.0, 4.0), 2 * 10 * H + 2 * 4 * D_IN + 2 * 2 * (D_IN + 1)),
        ("rank", (4.0,), 2 * 9 * D_IN + 2 * 4 * 24),
        ("low_rank", (), 2 * 9 * D_IN + 2 * 9 * 24),
    ],
)
def test_flops_by_hand(family: str, live: tuple[float, ...], expected: float) -> None:
    tensors = stored(family, weights_of(family)[0], 0.7)
    assert adapter_flops(FAMILIES[family], SITES[family], live, tensors) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mask_is_scaled_alone(family: str) -> None:
    """The live coordinates of a mask follow its own factor, and what the forward pass drops follows the masks."""
    weights, biases = weights_of(family)
    tensors = stored(family, weights, 0.7)
    x = torch.randn(50, D_IN)
    chosen, site = FAMILIES[family], SITES[family]
    tensors |= chosen.derive(weights, tensors)
    for index in range(len(chosen.mask_flops(site))):
        before = chosen.mask(index, site, x, weights, biases, tensors)
        after = chosen.mask(index, site, x, weights, biases, chosen.scaled(tensors, index, 2.0))
        torch.testing.assert_close(after.threshold, 2 * before.threshold)
        torch.testing.assert_close(after.z, before.z)
    nothing = tensors
    for index in range(len(chosen.mask_flops(site))):
        nothing = chosen.scaled(nothing, index, 1e9)
    if chosen.mask_flops(site):
        outputs = chosen.forward(site, x, weights, [None] * len(weights), nothing)
        assert all(not y.any() for y in outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_weights(family: str) -> None:
    """Masks carry none; everything else is differentiated as the formula is."""
    weights, biases = weights_of(family, torch.float64)
    tensors = {k: t.double() for k, t in stored(family, weights, 0.7).items()}
    x = torch.randn(6, D_IN, dtype=torch.float64)
    weights = [w.requires_grad_() for w in weights]

    def run(*given: Tensor) -> Tensor:
        full = tensors | FAMILIES[family].derive(list(given), tensors)
        return torch.cat(FAMILIES[family].forward(SITES[family], x, list(given), biases, full), -1)

    if family == "neuron":
        assert torch.autograd.gradcheck(run, tuple(weights), atol=1e-6)
    run(*weights).sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights)


def test_higher_threshold_never_keeps_more() -> None:
    weights, biases = weights_of("neuron")
    x = torch.randn(50, D_IN)
    counts = []
    for threshold in (0.0, 0.2, 0.5, 1.0, 3.0):
        mask = FAMILIES["neuron"].mask(0, STACK, x, weights, biases, stored("neuron", weights, threshold))
        counts.append(int((mask.z.abs() >= mask.threshold).sum()))
    assert all(a >= b for a, b in pairwise(counts))
    assert counts[0] == 50 * D_IN
