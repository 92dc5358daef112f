"""Neuron adapter: skip inputs whose importance ``abs(x_j)·c_j`` is below the threshold (TEAL, WINA).

T is the identity and A the weight itself, so the weights stay the user's. Each linear of a stack has a mask of its
own: ``threshold`` [linears, d_in] (``t / c_j``, float32). With a ``probe`` [linears, d_in + 1] (or none: [0, …])
importance is multiplied by the sensitivity predicted for the token, so that tokens the loss cares about keep more. Also
the paper's adapter for down_proj (METHOD.md, algorithm 2).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rana_compile.adapters.base import Biases, Mask, Tensors, kept, products, scale_of, scales, stack, weighed
from rana_compile.types import Site


class Neuron:
    name = "neuron"
    stored: tuple[str, ...] = ("threshold", "probe")

    def shapes(self, site: Site, tensors: Tensors) -> Mapping[str, tuple[int, ...]]:
        masks = len(site.d_outs)
        return {"threshold": (masks, site.d_in), "probe": probe_shape(site, masks, tensors)}

    def derive(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        return {}

    def mask(self, index: int, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, t: Tensors) -> Mask:
        return Mask(weighed(x, x, t["probe"][index : index + 1]), t["threshold"][index])

    def scaled(self, tensors: Tensors, index: int, factor: float) -> Tensors:
        return tensors | {"threshold": scaled_row(tensors["threshold"], index, factor)}

    def forward(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, tensors: Tensors
    ) -> tuple[Tensor, ...]:
        factors = scales(x, tensors["probe"], len(weights))
        masked = [kept(x, x, t, s) for t, s in zip(tensors["threshold"].unbind(), factors, strict=True)]
        return products(masked, weights, biases, tensors, site.d_outs)

    def pack(self, site: Site, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        weight_t = stack(weights).t().contiguous()  # [d_in, d_out]
        return {"threshold": tensors["threshold"], "probe": tensors["probe"], "weight_t": weight_t}

    def unpacked(self, site: Site, packed: Tensors) -> Sequence[Tensor]:
        return packed["weight_t"].t().split(list(site.d_outs))

    def decode(self, site: Site, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        parts, scale = list(site.d_outs), scale_of(x, packed["probe"])
        return torch.ops.rana.masked_linear(x, packed["threshold"], packed["weight_t"], bias, parts, scale)

    def fixed_flops(self, site: Site, tensors: Tensors) -> float:
        return 2.0 * tensors["probe"].numel()

    def mask_flops(self, site: Site) -> tuple[float, ...]:
        return tuple(2.0 * d_out for d_out in site.d_outs)


def neuron_tensors(threshold: Tensor) -> Tensors:
    """What a plan stores of an adapter with thresholds [linears, d_in] and no probe."""
    return {"threshold": threshold, "probe": threshold.new_zeros(0, threshold.shape[1] + 1)}


def probe_shape(site: Site, masks: int, tensors: Tensors) -> tuple[int, int]:
    return masks if len(tensors["probe"]) else 0, site.d_in + 1


def scaled_row(threshold: Tensor, index: int, factor: float) -> Tensor:
    """Thresholds [masks, n] with one row multiplied."""
    factors = torch.ones(len(threshold), 1, device=threshold.device)
    factors[index] = factor
    return threshold * factors
