"""Every family against the formula in float64, its kernels against its plain form, and its cost by hand."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.kernels import ops
from rana_compile.types import Site

D_OUTS = (7, 5, 12)
D_IN = 19
SITE = Site("s", "stacked", ("a", "b", "c"), D_IN, D_OUTS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the dtype's eps


def weights_of(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor | None]]:
    weights = [torch.randn(n, D_IN) for n in D_OUTS]
    biases: list[Tensor | None] = [torch.randn(D_OUTS[0]), None, torch.randn(D_OUTS[2])]
    return [w.to(dtype) for w in weights], [None if b is None else b.to(dtype) for b in biases]


def stored(family: str, weights: list[Tensor], threshold: float) -> Tensors:
    basis = torch.linalg.svd(torch.cat(weights).double(), full_matrices=False)[0][:, :9].to(torch.float32)
    sizes = {"threshold": D_IN if family == "neuron" else 9}
    every = {"output_basis": basis.contiguous(), "threshold": torch.full((sizes["threshold"],), threshold)}
    return {k: every[k] for k in FAMILIES[family].stored}


def exact(family: str, x: Tensor, weights: list[Tensor], biases: list[Tensor | None], tensors: Tensors) -> Tensor:
    """y = A (m * T x) + b in float64."""
    weight = torch.cat(weights).double()
    if family == "neuron":
        left, right = weight, torch.eye(D_IN, dtype=torch.float64)
    else:
        left = tensors["output_basis"].double()
        right = left.t() @ weight
    z = x.double() @ right.t()
    kept = z.abs() >= tensors["threshold"].double() if "threshold" in tensors else torch.ones_like(z)
    bias = torch.cat([torch.zeros(n) if b is None else b for n, b in zip(D_OUTS, biases, strict=True)])
    return (z * kept) @ left.t() + bias.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1e9], ids=["all live", "some", "none"])
def test_plain_form_is_the_formula(family: str, threshold: float) -> None:
    weights, biases = weights_of()
    tensors = stored(family, weights, threshold)
    x = torch.randn(4, 3, D_IN)
    full = tensors | FAMILIES[family].derive(weights, tensors)
    y = torch.cat(FAMILIES[family].forward(x, weights, biases, full), -1)
    torch.testing.assert_close(y.double(), exact(family, x, weights, biases, tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_compute_the_plain_form(family: str, dtype: torch.dtype) -> None:
    ops.load("cpu")
    weights, biases = weights_of(dtype)
    tensors = stored(family, weights, 0.7)
    x = torch.randn(1, 1, D_IN).to(dtype)
    full = tensors | FAMILIES[family].derive(weights, tensors)
    plain = torch.cat(FAMILIES[family].forward(x, weights, biases, full), -1)
    bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    fast = FAMILIES[family].decode(x, FAMILIES[family].pack(weights, tensors), bias)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast, plain, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("family", ["neuron", "rank"])
def test_nothing_dropped_is_dense(family: str) -> None:
    weights, biases = weights_of()
    tensors = stored(family, weights, 0.0)
    if family == "rank":
        basis = torch.linalg.svd(torch.cat(weights), full_matrices=False)[0]
        tensors = {"output_basis": basis, "threshold": torch.zeros(basis.shape[1])}
    x = torch.randn(4, D_IN)
    full = tensors | FAMILIES[family].derive(weights, tensors)
    outputs = FAMILIES[family].forward(x, weights, biases, full)
    for y, w, b in zip(outputs, weights, biases, strict=True):
        torch.testing.assert_close(y, torch.nn.functional.linear(x, w, b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "live", "expected"),
    [
        ("neuron", 10.0, 2 * 10 * 24),
        ("rank", 4.0, 2 * 9 * D_IN + 2 * 4 * 24),
        ("low_rank", 4.0, 2 * 9 * D_IN + 2 * 9 * 24),  # nothing is skipped, whatever `live` says
    ],
)
def test_flops_by_hand(family: str, live: float, expected: float) -> None:
    assert FAMILIES[family].flops(SITE, live, stored(family, weights_of()[0], 0.7)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_weights(family: str) -> None:
    """Masks carry none; everything else is differentiated as the formula is."""
    weights, biases = weights_of(torch.float64)
    tensors = {k: t.double() for k, t in stored(family, weights, 0.7).items()}
    x = torch.randn(6, D_IN, dtype=torch.float64)
    weights = [w.requires_grad_() for w in weights]

    def run(*given: Tensor) -> Tensor:
        full = tensors | FAMILIES[family].derive(list(given), tensors)
        return torch.cat(FAMILIES[family].forward(x, list(given), biases, full), -1)

    if family == "neuron":
        assert torch.autograd.gradcheck(run, tuple(weights), atol=1e-6)
    run(*weights).sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights)


def test_higher_threshold_never_keeps_more() -> None:
    weights, _ = weights_of()
    x = torch.randn(50, D_IN)
    counts = []
    for threshold in (0.0, 0.2, 0.5, 1.0, 3.0):
        z = FAMILIES["neuron"].coordinates(x, stored("neuron", weights, threshold))
        counts.append(int((z.abs() >= threshold).sum()))
    assert all(a >= b for a, b in pairwise(counts))
    assert counts[0] == 50 * D_IN
