"""The protocol of an adapter family, and the arithmetic the families share.

Every family is the masked product of METHOD.md, ``z = T x; y = A (m * z) + b``; it says what T and A
are, what is stored in a plan, and what must be derived from the model's own weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.kernels.reference import columns_of, is_dropped, runs, without
from rana_compile.types import Site

Tensors = dict[str, Tensor]
Biases = Sequence[Tensor | None]


@dataclass(frozen=True)
class Mask:
    """One mask of an adapter: coordinate j of a token is live unless ``abs(z_j) < threshold_j``."""

    z: Tensor  # [..., n]
    threshold: Tensor  # [n]


class Fitted(NamedTuple):
    """Tensors in one: as an input of a graph it costs less than several do at each call."""

    tensor: Tensor  # [n]
    places: Mapping[str, tuple[int, torch.Size]]  # where each starts, and its shape

    def part(self, name: str) -> Tensor:
        return part(self.tensor, *self.places[name])


def part(fitted: Tensor, start: int, sizes: Sequence[int]) -> Tensor:
    """A view of fitted [n]."""
    return fitted.narrow(0, start, math.prod(sizes)).view(sizes)


class Family(Protocol):
    """How one kind of adapter computes, stores and costs. Stateless.

    ``weights`` are the site's parameters [d_out_i, d_in], ``biases`` the matching biases or None,
    ``tensors`` what the plan stores plus what ``derive`` gives. An adapter has one or more masks, in the order
    in which they are computed.
    """

    name: str
    stored: tuple[str, ...]

    def shapes(self, site: Site, tensors: Tensors) -> Mapping[str, tuple[int, ...]]:
        """The shapes that stored tensors must have; where that is a choice (a rank, a probe), as these made it.

        Raises ValueError for a site that the family cannot adapt.
        """

    def derive(self, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        """Tensors that follow from the weights, differentiable in them; folded for inference."""

    def mask(self, index: int, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, t: Tensors) -> Mask:
        """The mask of this index for x [..., d_in]."""

    def scaled(self, tensors: Tensors, index: int, factor: float) -> Tensors:
        """The tensors with the thresholds of one mask multiplied."""

    def forward(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Biases, tensors: Tensors
    ) -> tuple[Tensor, ...]:
        """Masked dense form in plain torch: one output [..., d_out_i] per weight. Differentiable; any row count."""

    def pack(self, site: Site, weights: Sequence[Tensor], tensors: Tensors) -> Tensors:
        """Contiguous layouts, in the weights' dtype, for ``decode``."""

    def unpacked(self, site: Site, packed: Tensors) -> Sequence[Tensor]:
        """The weights [d_out_i, d_in] as views of the layouts; none where the layouts do not hold them."""

    def decode(self, site: Site, x: Tensor, packed: Tensors, bias: Tensor | None) -> Tensor:
        """The same through the masked kernels: x [..., d_in] -> [..., d_out] (stacked)."""

    def fixed_flops(self, site: Site, tensors: Tensors) -> float:
        """FLOPs per token whatever the masks say."""

    def mask_flops(self, site: Site) -> tuple[float, ...]:
        """FLOPs per live coordinate of each mask."""


def adapter_flops(family: Family, site: Site, live: Sequence[float], tensors: Tensors) -> float:
    """FLOPs per token when ``live[i]`` coordinates of mask i survive on average."""
    masked = sum(n * each for n, each in zip(live, family.mask_flops(site), strict=True))
    return family.fixed_flops(site, tensors) + masked


LIMIT = 2.0  # of log s: no token is taken for more than e² times as sensitive as the usual one, nor for less


def sensitivities(x: Tensor, probe: Tensor) -> list[Tensor]:
    """How much each token x [..., d] matters to each mask, relative to the usual token: float32 [...], one a mask.

    ``probe`` [masks, d + 1] holds slopes and an offset of the logarithm (``rana_compile.probe``). One sum a mask:
    Inductor fuses such sums into the kernel that made x, and what follows from them, but not a sum over [masks, d].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    logs = [(wide * slopes).sum(-1) + offset for slopes, offset in zip(probe[:, :-1], probe[:, -1], strict=True)]
    return [log.clamp(-LIMIT, LIMIT).exp() for log in logs]


def sensitivity(x: Tensor, probe: Tensor) -> Tensor:
    """The same as one tensor [..., masks]."""
    return torch.stack(sensitivities(x, probe), -1)


def scales(x: Tensor, probe: Tensor, masks: int) -> Sequence[Tensor | None]:
    """What the tokens x [..., d] multiply each mask's magnitudes by, [...]; None without a probe ([0, d + 1])."""
    return sensitivities(x, probe) if len(probe) else [None] * masks


def scale_of(x: Tensor, probe: Tensor) -> Tensor | None:
    """The same as the kernels take it: [..., masks]."""
    return sensitivity(x, probe) if len(probe) else None


def weighed(z: Tensor, x: Tensor, probe: Tensor) -> Tensor:
    """z [..., n] times the sensitivity of the tokens x [..., d] to one mask: what its threshold is compared with."""
    return z * sensitivity(x, probe) if len(probe) else z


SOFTNESS = 0.3  # of a mask in the backward pass, in units of log |z|


def nearness(z: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """How fast each coordinate would be lost as log t grows, were its mask σ((log |z|·s - log t) / SOFTNESS).

    Args as of ``kept``; float32, of z's shape. Zero where the threshold is.
    """
    magnitude = z.abs().float() if scale is None else z.abs() * scale[..., None]
    live = magnitude.log().sub_(threshold.log()).div_(SOFTNESS).sigmoid_()
    return (live - live.square()).div_(SOFTNESS).nan_to_num_(0.0)


class _StraightThrough(torch.autograd.Function):
    """``value`` where the mask keeps z, else zero; in the backward pass the mask is soft."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, z: Tensor, threshold: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(value, z, threshold, scale)
        return without(value, is_dropped(z, threshold, scale))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        value, z, threshold, scale = ctx.saved_tensors
        by_log = (gradient.float() * value.float() * nearness(z, threshold, scale)).nan_to_num_(
            0.0, 0.0, 0.0
        )  # of log |z|·s; of log t with a minus
        of_z = torch.where(z == 0, 0.0, by_log / z).to(z.dtype)
        rows = tuple(range(by_log.dim() - threshold.dim()))
        of_threshold = -torch.where(threshold == 0, 0.0, by_log.sum(rows) / threshold)
        of_scale = None if scale is None else by_log.sum(-1) / scale
        return without(gradient, is_dropped(z, threshold, scale)), of_z, of_threshold, of_scale


def kept(value: Tensor, z: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """``value`` [..., n] with zeros where the mask of z [..., n] drops it; threshold [n], scale [...] as in kernels.

    A threshold that requires a gradient gets a straight-through estimate, and so do z and scale.
    """
    if threshold.requires_grad and torch.is_grad_enabled():
        return _StraightThrough.apply(value, z, threshold, scale)
    return without(value, is_dropped(z, threshold, scale))


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Parts along the output dimension; no copy for one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=0)


def split_linear(z: Tensor, weight: Tensor, biases: Biases, d_outs: Sequence[int]) -> tuple[Tensor, ...]:
    """One product with a stacked weight [d_out, d], split into the parts' outputs."""
    parts = F.linear(z, weight).split(list(d_outs), dim=-1)
    return tuple(part if b is None else part + b for part, b in zip(parts, biases, strict=True))


def products(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Biases, tensors: Tensors, d_outs: Sequence[int]
) -> tuple[Tensor, ...]:
    """Each part's input [..., d] with its weight [d_out, d].

    Where ``tensors`` hold the weights side by side, [d, d_out], parts are computed together: all of them
    (``weight_t``), or those of ``batched_parts`` (``batched_weight_t``); their ``weights`` are not read then.
    """
    if "weight_t" in tensors:
        return one_product(inputs, tensors["weight_t"], biases, d_outs)
    if "batched_weight_t" in tensors:
        return batched(inputs, weights, tensors["batched_weight_t"], biases, d_outs)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))


def one_product(
    inputs: Sequence[Tensor], weight_t: Tensor, biases: Biases, d_outs: Sequence[int]
) -> tuple[Tensor, ...]:
    """Each part's input [..., d] with its columns of weight_t [d, d_out], as one product of all with all.

    For as many rows as it was measured faster for: one large weight is read faster than several small ones.
    """
    products = torch.stack(list(inputs)) @ weight_t  # [parts, ..., d_out]
    parts = [y.split(list(d_outs), dim=-1)[i] for i, y in enumerate(products)]
    return tuple(part if b is None else part + b for part, b in zip(parts, biases, strict=True))


def batched_parts(d_outs: Sequence[int]) -> set[int]:
    """Those that ``batched`` computes in batches."""
    return {i for first, many in runs(d_outs) if many > 1 for i in range(first, first + many)}


def batched(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], weight_t: Tensor, biases: Biases, d_outs: Sequence[int]
) -> tuple[Tensor, ...]:
    """Each part's input [..., d] with its weight [d_out, d], those side by side of one width as one batch.

    For as many rows as it was measured faster for: fewer kernels do as much.
    """
    parts: list[Tensor] = []
    for first, many in runs(d_outs):
        if many == 1:
            parts.append(F.linear(inputs[first], weights[first]))
        else:
            z = torch.stack(list(inputs[first : first + many]))  # [many, ..., d]
            columns = columns_of(weight_t, d_outs, first, many)
            parts += torch.bmm(z.flatten(1, -2), columns).unflatten(1, z.shape[1:-1]).unbind()
    return tuple(part if b is None else part + b for part, b in zip(parts, biases, strict=True))
