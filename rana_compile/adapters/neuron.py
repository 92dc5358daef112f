"""Neuron adapter: skip inputs whose importance ``abs(x_j)·c_j`` is below the site's threshold (TEAL, WINA).

T is the identity and A the weight itself, so the weights stay the user's: only ``threshold`` [d_in]
(``t / c_j``, float32) is stored. Also the paper's adapter for down_proj (METHOD.md, algorithm 2).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters.base import Tensors, stack
from rana_compile.flops import masked_flops
from rana_compile.kernels.reference import apply_threshold
from rana_compile.types import Site


class Neuron:
    name = "neuron"
    stored: tuple[str, ...] = ("threshold",)

    def derive(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        return {}

    def coordinates(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tensors: Tensors
    ) -> tuple[Tensor, ...]:
        masked = apply_threshold(x, tensors["threshold"])
        return tuple(F.linear(masked, w, b) for w, b in zip(weights, biases, strict=True))

    def pack(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        return {"threshold": tensors["threshold"], "weight_t": stack(weights).t().contiguous()}  # [d_in, d_out]

    def decode(self, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        return torch.ops.rana.masked_linear(x, packed["threshold"], packed["weight_t"], bias)

    def flops(self, site: Site, live: float, tensors: Tensors) -> float:
        return masked_flops(live, site.d_out)
