"""Static low rank (SVD-LLM style): a rank adapter that keeps every coordinate of its whitened basis."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters.base import Biases, Tensors, split_linear
from rana_compile.adapters.rank import Rank
from rana_compile.flops import masked_flops
from rana_compile.types import Site


class LowRank(Rank):
    name = "low_rank"
    stored: tuple[str, ...] = ("output_basis",)

    def shapes(self, site: Site, tensors: Tensors) -> Mapping[str, tuple[int, ...]]:
        return {"output_basis": super().shapes(site, tensors)["output_basis"]}

    def forward(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, tensors: Tensors
    ) -> tuple[Tensor, ...]:
        z = F.linear(x, tensors["basis"])
        return split_linear(z, tensors["output_basis"].to(z.dtype), biases, site.d_outs)

    def pack(self, site: Site, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        derived = self.derive(weights, tensors)
        return {"basis": derived["basis"].contiguous(), "weight": derived["output_basis"].contiguous()}

    def decode(self, site: Site, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        z = torch.ops.rana.linear(x, packed["basis"], None)
        return torch.ops.rana.linear(z, packed["weight"], bias)

    def fixed_flops(self, site: Site, tensors: Tensors) -> float:
        return masked_flops(tensors["output_basis"].shape[1], site.d_in + site.d_out)

    def mask_flops(self, site: Site) -> tuple[float, ...]:
        return ()
