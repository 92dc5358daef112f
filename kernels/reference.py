"""The semantics of every op, in plain PyTorch: the tests' oracle and the fake kernels' shape rule.

One idea serves every adapter: a product in which small coordinates are skipped,

    y = At.T @ (m * z) + bias,    m_j = not (abs(z_j) < threshold_j)

Importance scores of the form ``abs(z_j) * c_j >= t`` become per-coordinate thresholds ``t / c_j``,
so the magnitude, the column-norm and the loss-aware rule are the same op. A threshold of zero
keeps a coordinate always; NaN is kept, so that a broken input stays visible.

Products accumulate in float32 (float64 for float64 inputs); results have the dtype of the input.
"""

import torch
from torch import Tensor

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
