"""Neuron adapter: skip inputs whose importance ``abs(x_j)·c_j`` is below the threshold (TEAL, WINA).

T is the identity and A the weight itself, so the weights stay the user's. Each linear of a stack has a mask of its
own: only ``threshold`` [linears, d_in] (``t / c_j``, float32) is stored. Also the paper's adapter for down_proj
(METHOD.md, algorithm 2).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters.base import Biases, Mask, Tensors, stack
from rana_compile.kernels.reference import apply_threshold
from rana_compile.types import Site


class Neuron:
    name = "neuron"
    stored: tuple[str, ...] = ("threshold",)

    def derive(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        return {}

    def mask(self, index: int, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, t: Tensors) -> Mask:
        return Mask(x, t["threshold"][index])

    def scaled(self, tensors: Tensors, index: int, factor: float) -> Tensors:
        return tensors | {"threshold": scaled_row(tensors["threshold"], index, factor)}

    def forward(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, tensors: Tensors
    ) -> tuple[Tensor, ...]:
        parts = zip(weights, biases, tensors["threshold"], strict=True)
        return tuple(F.linear(apply_threshold(x, t), w, b) for w, b, t in parts)

    def pack(self, site: Site, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        return {"threshold": tensors["threshold"], "weight_t": stack(weights).t().contiguous()}  # [d_in, d_out]

    def decode(self, site: Site, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        return torch.ops.rana.masked_linear(x, packed["threshold"], packed["weight_t"], bias, list(site.d_outs))

    def fixed_flops(self, site: Site, tensors: Tensors) -> float:
        return 0.0

    def mask_flops(self, site: Site) -> tuple[float, ...]:
        return tuple(2.0 * d_out for d_out in site.d_outs)


def scaled_row(threshold: Tensor, index: int, factor: float) -> Tensor:
    """Thresholds [masks, n] with one row multiplied."""
    factors = torch.ones(len(threshold), 1, device=threshold.device)
    factors[index] = factor
    return threshold * factors
