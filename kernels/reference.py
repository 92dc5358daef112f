"""The semantics of every op, in plain PyTorch: the tests' oracle and the fake kernels' shape rule.

One idea serves every adapter: a product in which small coordinates are skipped,

    y = At.T @ (m * z) + bias,    m_j = not (abs(z_j) * scale < threshold_j)

Importance scores of the form ``abs(z_j) * c_j >= t`` become per-coordinate thresholds ``t / c_j``,
so the magnitude, the column-norm and the loss-aware rule are the same op; the scale, if any, is a row's: how much
that token matters. A threshold of zero keeps a coordinate always; NaN is kept, so that a broken input stays visible.

Products accumulate in float32 (float64 for float64 inputs); results have the dtype of the input.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

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


def is_dropped(z: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """Whether the magnitudes of ``z`` [..., d], times the row's ``scale`` [...], are below ``threshold`` [d].

    Threshold and scale are float32, and so is what is compared unless ``z`` is float64.
    """
    return (z.abs() if scale is None else z.abs() * scale[..., None]) < threshold


def apply_threshold(z: Tensor, threshold: Tensor, scale: Tensor | None = None) -> Tensor:
    """Zero the coordinates of ``z`` that the mask drops."""
    return without(z, is_dropped(z, threshold, scale))


def without(z: Tensor, dropped: Tensor) -> Tensor:
    """``z`` with zeros where ``dropped``."""
    return torch.where(dropped, torch.zeros((), dtype=z.dtype, device=z.device), z)


def of_mask(scale: Tensor | None, index: int) -> Tensor | None:
    """What one mask's coordinates are multiplied by, [...], of a ``scale`` [..., masks]."""
    return None if scale is None else scale[..., index]


def runs(d_outs: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Parts side by side of one width: the first, and how many."""
    first = 0
    for _, same in groupby(d_outs):
        many = len(list(same))
        yield first, many
        first += many


def columns_of(weight_t: Tensor, d_outs: Sequence[int], first: int, many: int) -> Tensor:
    """What a run's parts are multiplied with, [many, d, width], of weight_t [d, d_out]."""
    width = d_outs[first]
    return weight_t.narrow(1, sum(d_outs[:first]), many * width).unflatten(1, (many, width)).transpose(0, 1)


def _product(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight_t.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense product: x [..., d_in], weight [d_out, d_in] -> [..., d_out]."""
    return _product(x, weight.t(), bias)


def masked_linear(
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    bias: Tensor | None = None,
    parts: Sequence[int] = (),
    scale: Tensor | None = None,
) -> Tensor:
    """Masked product: z [..., d], threshold [d], weight_t [d, d_out] -> [..., d_out].

    With ``parts``, which sum to d_out, the columns of each part have a mask of their own: threshold [len(parts), d].
    With ``scale`` [..., masks] (float32) a row's magnitudes are multiplied by it before they are compared.
    """
    if not parts:
        return _product(apply_threshold(z, threshold, of_mask(scale, 0)), weight_t, bias)
    columns = weight_t.split(list(parts), dim=1)
    biases = [None] * len(parts) if bias is None else bias.split(list(parts))
    each = enumerate(zip(threshold, columns, biases, strict=True))
    return torch.cat([_product(apply_threshold(z, t, of_mask(scale, i)), w, b) for i, (t, w, b) in each], dim=-1)


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
    up_scale: Tensor | None = None,
) -> Tensor:
    """Both products of a gated MLP masked: x [..., d_in], up_weight_t [d_in, 2h], down_weight_t [h, d_out].

    The first h columns of ``up_weight_t`` are the gate's, the others the up projection's; so are the two rows of
    ``up_threshold`` [2, d_in], or one [d_in] serves both. ``down_threshold`` is [h], or [1, h] as plans store it.
    ``up_scale`` is to ``up_threshold`` as ``scale`` is in ``masked_linear``.
    """
    h = down_weight_t.shape[0]
    parts = (h, h) if up_threshold.dim() == 2 else ()
    hidden = gated(masked_linear(x, up_threshold, up_weight_t, up_bias, parts, up_scale), activation)
    return masked_linear(hidden, down_threshold.reshape(-1), down_weight_t, down_bias)


def gated_up(
    x: Tensor,
    threshold: Tensor,
    gate_weight_t: Tensor,
    gate_threshold: Tensor,
    up_weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None = None,
) -> Tensor:
    """Rows of ``up`` only where the activated gate survives: x [..., d_in] -> gate, then up [..., 2h].

    threshold [d_in], gate_weight_t [d_in, h], gate_threshold [h], up_weight [h, d_in], bias [2h]; up is zero
    where ``abs(act(gate))`` is below its threshold. ``scale`` [..., 2] is of both masks, as in ``masked_linear``.
    """
    check_activation(activation)
    biases = (None, None) if bias is None else bias.chunk(2)
    gate = masked_linear(x, threshold, gate_weight_t, biases[0], scale=None if scale is None else scale[..., :1])
    dead = is_dropped(ACTIVATIONS[activation](gate), gate_threshold, of_mask(scale, 1))
    return torch.cat([gate, without(linear(x, up_weight, biases[1]), dead)], dim=-1)


def gated(y: Tensor, activation: str) -> Tensor:
    """Gate columns, then up columns: y [..., 2h] -> act(gate) * up [..., h]."""
    check_activation(activation)
    gate, up = y.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def check_activation(name: str) -> None:
    """Raise RanaError unless the kernels know the activation."""
    if name not in ACTIVATIONS:
        raise RanaError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")
