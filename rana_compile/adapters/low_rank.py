"""Static low rank (SVD-LLM style): a rank adapter that keeps every coordinate of its whitened basis."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rana_compile.adapters.base import Tensors, split_linear
from rana_compile.adapters.rank import Rank
from rana_compile.types import Site


class LowRank(Rank):
    name = "low_rank"
    stored: tuple[str, ...] = ("output_basis",)

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], tensors: Tensors
    ) -> tuple[Tensor, ...]:
        z = self.coordinates(x, tensors)
        return split_linear(z, tensors["output_basis"].to(z.dtype), biases, [w.shape[0] for w in weights])

    def pack(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        basis = self.derive(weights, tensors)["basis"].contiguous()
        return {"basis": basis, "weight": tensors["output_basis"].to(basis.dtype).contiguous()}

    def decode(self, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        z = torch.ops.rana.linear(x, packed["basis"], None)
        return torch.ops.rana.linear(z, packed["weight"], bias)

    def flops(self, site: Site, live: float, tensors: Tensors) -> float:
        return super().flops(site, tensors["output_basis"].shape[1], tensors)
