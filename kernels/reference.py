"""The semantics of every op, in plain PyTorch: the tests' oracle and the fake kernels' shape rule.

One idea serves every adapter: a product in which small coordinates are skipped,

    y = At.T @ (m * z) + bias,    m_j = not (abs(z_j) < threshold_j)

Importance scores of the form ``abs(z_j) * c_j >= t`` become per-coordinate thresholds ``t / c_j``,
so the magnitude, the column-norm and the loss-aware rule are the same op. A threshold of zero
keeps a coordinate always; NaN is kept, so that a broken input stays visible.

Products accumulate in float32 (float64 for float64 inputs); results have the dtype of the input.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.types import RanaError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def apply_threshold(z: Tensor, threshold: Tensor) -> Tensor:
    """Zero the coordinates of ``z`` [..., d] whose magnitude is below ``threshold`` [d] (float32)."""
    return torch.where(z.abs() < threshold, torch.zeros((), dtype=z.dtype, device=z.device), z)


def _product(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight_t.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense product: x [..., d_in], weight [d_out, d_in] -> [..., d_out]."""
    return _product(x, weight.t(), bias)


def masked_linear(z: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Masked product: z [..., d], threshold [d], weight_t [d, d_out] -> [..., d_out]."""
    return _product(apply_threshold(z, threshold), weight_t, bias)


def rank_linear(x: Tensor, basis: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense product, then a masked one: x [..., d_in], basis [r, d_in], weight_t [r, d_out] -> [..., d_out]."""
    return masked_linear(linear(x, basis), threshold, weight_t, bias)


def gated_mlp(
    x: Tensor,
    up_threshold: Tensor,
    up_weight_t: Tensor,
    up_bias: Tensor | None,
    down_threshold: Tensor,
    down_weight_t: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Both products of a gated MLP masked: x [..., d_in], up_weight_t [d_in, 2h], down_weight_t [h, d_out].

    The first h columns of ``up_weight_t`` are the gate's, the others the up projection's.
    """
    hidden = gated(masked_linear(x, up_threshold, up_weight_t, up_bias), activation)
    return masked_linear(hidden, down_threshold, down_weight_t, down_bias)


def gated(y: Tensor, activation: str) -> Tensor:
    """Gate columns, then up columns: y [..., 2h] -> act(gate) * up [..., h]."""
    check_activation(activation)
    gate, up = y.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def check_activation(name: str) -> None:
    """Raise RanaError unless the kernels know the activation."""
    if name not in ACTIVATIONS:
        raise RanaError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
