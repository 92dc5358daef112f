"""Nodes that compute ``y = x Wᵀ + b``, however a model writes them:

    linear(x, W, b)        addmm(b, x, Wᵀ)        x @ Wᵀ        x @ W.T, matmul(x, W.t()), ...

where W or Wᵀ is a parameter. GPT-2's Conv1D is the second form with Wᵀ [d_in, d_out] stored, Falcon's the fourth.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rana_compile.passes.match import op_name


@dataclass(frozen=True)
class Product:
    """One such node. ``transposed``: ``weight`` (a node) holds Wᵀ [d_in, d_out]."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def products(graph: fx.Graph) -> Iterator[Product]:
    """All of a graph, in its order: products with at most one bias whose right factor has two dimensions."""
    for node in graph.nodes:
        if read := _READERS.get(node.target if node.op == "call_function" else (node.op, node.target)):
            if product := read(node):
                yield product


def _linear(node: fx.Node) -> Product | None:
    values = _named(node, ("input", "weight", "bias"))
    weight, swapped = _untransposed(values["weight"])
    return Product(node, values["input"], weight, values.get("bias"), swapped)


def _addmm(node: fx.Node) -> Product | None:
    values = _named(node, ("input", "mat1", "mat2"))
    if values.get("beta", 1) != 1 or values.get("alpha", 1) != 1 or _dimensions(values["input"]) != 1:
        return None
    weight, swapped = _untransposed(values["mat2"])
    return Product(node, values["mat1"], weight, values["input"], not swapped)


def _matmul(node: fx.Node) -> Product | None:
    values = _named(node, ("input", "mat2" if "mat2" in node.kwargs else "other"))
    x, right = list(values.values())[:2]
    if not isinstance(x, fx.Node) or not isinstance(right, fx.Node) or _dimensions(right) != 2:
        return None
    weight, swapped = _untransposed(right)
    if weight.op != "placeholder" or _dimensions(x) < 2:
        return None  # a product of two activations
    return Product(node, x, weight, None, not swapped)


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """(the node whose transpose this is, True), or (the node itself, False)."""
    if not _is_transpose(node):
        return node, False
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    return inner, True


def _is_transpose(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node) or _dimensions(node.args[0]) != 2:
        return False
    name, rest = op_name(node), node.args[1:]
    if name == "getattr":
        return rest in (("T",), ("mT",))
    if name == "permute":
        return rest in ((1, 0), ((1, 0),), ([1, 0],))
    return name in ("t", "numpy_T", "mT") or (
        name in ("transpose", "swapaxes") and {d % 2 for d in rest if isinstance(d, int)} == {0, 1}
    )


def _dimensions(node: Any) -> int:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else -1


_READERS: Mapping[Any, Callable[[fx.Node], Product | None]] = {
    torch._C._nn.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    operator.matmul: _matmul,
    ("call_method", "matmul"): _matmul,
    ("call_method", "mm"): _matmul,
}
