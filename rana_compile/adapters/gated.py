"""Gated adapter (CATS, arXiv 2404.08763): rows of ``up`` are computed only where the activated gate survives.

    g = W_gate (m_in * x) + b;   a = act(g);   m_j = not (abs(a_j) < gate_threshold_j);   up_j = m_j · (W_up x + b)_j

A dead row leaves a zero in the hidden vector, which ``down`` may skip too. The gate has a neuron adapter's mask:
``threshold`` [1, d_in]; ``gate_threshold`` [h]; both float32. What is compared with them is multiplied by what a
``probe`` [2, d_in + 1] predicts for the token, if there is one (else [0, …]). For sites of kind ``gate_up`` whose
activation is known.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters.base import Biases, Mask, Tensors, kept, products, scale_of, scales, weighed
from rana_compile.adapters.neuron import probe_shape, scaled_row
from rana_compile.kernels.reference import ACTIVATIONS
from rana_compile.types import Site


class Gated:
    name = "gated"
    stored: tuple[str, ...] = ("threshold", "gate_threshold", "probe")

    def shapes(self, site: Site, tensors: Tensors) -> Mapping[str, tuple[int, ...]]:
        if site.kind != "gate_up" or len(set(site.d_outs)) != 1 or site.activation not in ACTIVATIONS:
            raise ValueError(f"{site.name}: it has no gate whose activation is known")
        return {
            "threshold": (1, site.d_in),
            "gate_threshold": site.d_outs[:1],
            "probe": probe_shape(site, 2, tensors),
        }

    def derive(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        return {}

    def mask(self, index: int, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, t: Tensors) -> Mask:
        if index == 0:
            return Mask(weighed(x, x, t["probe"][:1]), t["threshold"][0])
        gate = F.linear(self._masked(x, t), weights[0], biases[0])
        activated = self._activated(site, gate)
        return Mask(weighed(activated, x, t["probe"][1:]), t["gate_threshold"])

    def _masked(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The gate's input."""
        (scale,) = scales(x, tensors["probe"][:1], 1)
        return kept(x, x, tensors["threshold"][0], scale)

    def _activated(self, site: Site, gate: Tensor) -> Tensor:
        assert site.activation is not None
        return ACTIVATIONS[site.activation](gate)

    def scaled(self, tensors: Tensors, index: int, factor: float) -> Tensors:
        if index == 0:
            return tensors | {"threshold": scaled_row(tensors["threshold"], 0, factor)}
        return tensors | {"gate_threshold": tensors["gate_threshold"] * factor}

    def forward(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, tensors: Tensors
    ) -> tuple[Tensor, ...]:
        gate, up = products([self._masked(x, tensors), x], weights, biases, tensors, site.d_outs)
        (scale,) = scales(x, tensors["probe"][1:], 1)
        return gate, kept(up, self._activated(site, gate), tensors["gate_threshold"], scale)

    def pack(self, site: Site, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        gate_t = weights[0].t().contiguous()  # [d_in, h]
        return {
            "threshold": tensors["threshold"][0].contiguous(),
            "gate_threshold": tensors["gate_threshold"].contiguous(),
            "probe": tensors["probe"],
            "gate_weight_t": gate_t,
            "up_weight": weights[1].contiguous(),
        }

    def unpacked(self, site: Site, packed: Tensors) -> Sequence[Tensor]:
        return packed["gate_weight_t"].t(), packed["up_weight"]

    def decode(self, site: Site, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        names = ("threshold", "gate_weight_t", "gate_threshold", "up_weight")
        return torch.ops.rana.gated_up(
            x, *(packed[name] for name in names), bias, site.activation, scale_of(x, packed["probe"])
        )

    def fixed_flops(self, site: Site, tensors: Tensors) -> float:
        return 2.0 * tensors["probe"].numel()

    def mask_flops(self, site: Site) -> tuple[float, ...]:
        return 2.0 * site.d_outs[0], 2.0 * site.d_in
