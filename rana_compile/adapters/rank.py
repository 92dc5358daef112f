"""Rank adapter, the paper's (METHOD.md, algorithm 1): ``z = B x``, skip the small ``z_j``, ``y = U (m * z) + b``.

``U`` [d_out, r] has orthonormal columns (the left singular vectors of W X), ``B = Uᵀ W`` is derived from the
model's own weights, and ``threshold`` [r] (float32) is compared with ``abs(z_j)``.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters.base import Biases, Mask, Tensors, kept, split_linear, stack
from rana_compile.flops import masked_flops
from rana_compile.types import Site


class Rank:
    name = "rank"
    stored: tuple[str, ...] = ("output_basis", "threshold")

    def shapes(self, site: Site, tensors: Tensors) -> Mapping[str, tuple[int, ...]]:
        rank = tensors["output_basis"].shape[-1]
        return {"output_basis": (site.d_out, rank), "threshold": (rank,)}

    def derive(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        weight = stack(weights)
        basis = tensors["output_basis"].t().float() @ weight.float()  # [r, d_in]
        return {"basis": basis.to(weight.dtype), "output_basis": tensors["output_basis"].to(weight.dtype)}

    def mask(self, index: int, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, t: Tensors) -> Mask:
        return Mask(F.linear(x, t["basis"]), t["threshold"])

    def scaled(self, tensors: Tensors, index: int, factor: float) -> Tensors:
        return tensors | {"threshold": tensors["threshold"] * factor}

    def forward(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, tensors: Tensors
    ) -> tuple[Tensor, ...]:
        z = F.linear(x, tensors["basis"])
        z = kept(z, z, tensors["threshold"])
        return split_linear(z, tensors["output_basis"].to(z.dtype), biases, site.d_outs)

    def pack(self, site: Site, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        derived = self.derive(weights, tensors)
        return {
            "basis": derived["basis"].contiguous(),
            "threshold": tensors["threshold"],
            "weight_t": derived["output_basis"].t().contiguous(),  # [r, d_out]
        }

    def unpacked(self, site: Site, packed: Tensors) -> Sequence[Tensor]:
        return ()

    def decode(self, site: Site, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        return torch.ops.rana.rank_linear(x, packed["basis"], packed["threshold"], packed["weight_t"], bias)

    def fixed_flops(self, site: Site, tensors: Tensors) -> float:
        return masked_flops(tensors["output_basis"].shape[1], site.d_in)

    def mask_flops(self, site: Site) -> tuple[float, ...]:
        return (2.0 * site.d_out,)
