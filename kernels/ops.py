"""The ops ``torch.ops.rana.*``: schema and shape rule once, implementations per device on demand.

To add a device: one file that registers its implementations, and one line in ``_LOADERS``. To add an op: its plain
form in ``reference.py``, its schema here, and an implementation per device.
"""

import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from rana_compile.kernels.reference import check_activation
from rana_compile.types import RanaError

SCHEMAS = (
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "masked_linear(Tensor z, Tensor threshold, Tensor weight_t, Tensor? bias, int[] parts=[], Tensor? scale=None) "
    "-> Tensor",
    "rank_linear(Tensor x, Tensor basis, Tensor threshold, Tensor weight_t, Tensor? bias) -> Tensor",
    "gated_mlp(Tensor x, Tensor up_threshold, Tensor up_weight_t, Tensor? up_bias, Tensor down_threshold, "
    "Tensor down_weight_t, Tensor? down_bias, str activation, Tensor? up_scale=None) -> Tensor",
    "gated_up(Tensor x, Tensor threshold, Tensor gate_weight_t, Tensor gate_threshold, Tensor up_weight, "
    "Tensor? bias, str activation, Tensor? scale=None) -> Tensor",
)
NAMES = tuple(schema.partition("(")[0] for schema in SCHEMAS)
LIBRARY = torch.library.Library("rana", "DEF")
for schema in SCHEMAS:
    LIBRARY.define(schema)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})  # what the kernels take
MOST_DECODED = 16  # rows of an input that is taken for a batch in decode, not for a prompt
_LOADERS = {"cpu": "rana_compile.kernels.cpu", "cuda": "rana_compile.kernels.cuda"}
_LOCK = threading.Lock()


@torch.library.register_fake("rana::linear", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("rana::masked_linear", lib=LIBRARY)
def _(
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    parts: Sequence[int] = (),
    scale: Tensor | None = None,
) -> Tensor:
    return z.new_empty((*z.shape[:-1], weight_t.shape[1]))


@torch.library.register_fake("rana::rank_linear", lib=LIBRARY)
def _(x: Tensor, basis: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_t.shape[1]))


@torch.library.register_fake("rana::gated_mlp", lib=LIBRARY)
def _(
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
    check_activation(activation)
    return x.new_empty((*x.shape[:-1], down_weight_t.shape[1]))


@torch.library.register_fake("rana::gated_up", lib=LIBRARY)
def _(
    x: Tensor,
    threshold: Tensor,
    gate_weight_t: Tensor,
    gate_threshold: Tensor,
    up_weight: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None = None,
) -> Tensor:
    check_activation(activation)
    return x.new_empty((*x.shape[:-1], 2 * up_weight.shape[0]))


def is_supported(device_type: str) -> bool:
    """Whether there are masked kernels for this kind of device."""
    return device_type in _LOADERS


def linear_is_faster(rows: int | None, d: int, d_out: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the dense kernel beats the library's product of x [rows, d] and weight [d_out, d] on this device.

    ``rows`` is None where their number varies: whether it is better on the whole, and never worth mentioning slower.
    """
    if dtype not in DTYPES or not is_supported(device.type) or rows == 0:
        return False
    load(device.type)
    return bool(import_module(_LOADERS[device.type]).linear_is_faster(rows, d, d_out, dtype))


def masked_is_faster(
    rows: int | None,
    d: int,
    d_out: int,
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    gated: bool = False,
    before: int | None = None,
) -> bool:
    """Whether the masked kernel beats the library's dense product on this device; measured there at the first call.

    For z [rows, d] of which ``density`` is live in each row, weight_t [d, d_out], or [d, 2h] of a gated MLP if
    ``gated``. The rows (None as above) share the weight rows that any of them needs. ``before``: the inputs of a dense
    product that gives z and is part of the op, as a rank adapter's. False for a dtype or device without kernels.
    """
    if dtype not in DTYPES or not is_supported(device.type) or rows == 0:
        return False
    load(device.type)
    module = import_module(_LOADERS[device.type])
    return bool(module.masked_is_faster(rows, d, d_out, _union(rows, density), dtype, device, gated, before))


def gated_is_faster(rows: int | None, d: int, h: int, density: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``gated_up`` of x [rows, d], of which the gate keeps ``density``, beats the library's two products.

    ``rows`` and measurements as above.
    """
    if dtype not in DTYPES or not is_supported(device.type) or rows == 0:
        return False
    load(device.type)
    module = import_module(_LOADERS[device.type])
    return bool(module.gated_is_faster(rows, d, h, _union(rows, density), dtype, device))


def _union(rows: int | None, density: float) -> float:
    """The share that some row keeps where each keeps ``density``."""
    return 1.0 if rows is None else 1 - (1 - min(density, 1.0)) ** rows


def stack_form(rows: int | None, d: int, d_outs: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    """How the parts of a stack, each an input [rows, d] and a weight [d_out, d] of its own, are computed fastest.

    ``apart``: a product each. ``together``: all inputs with all columns, of which each keeps its own; the same weights
    are read in one kernel, for as many times the multiply-adds as there are parts: free while memory, or starting
    kernels, is the limit. ``batched``: parts side by side of one width as one batch, in as many multiply-adds. Measured
    once; ``apart`` where rows vary (None) or there are no kernels for it.
    """
    if rows is None or rows < 2 or len(d_outs) < 2 or not d * sum(d_outs):
        return "apart"
    if dtype not in DTYPES or not is_supported(device.type):
        return "apart"
    return str(import_module(_LOADERS[device.type]).stack_form(rows, d, tuple(d_outs), dtype, device))


def load(device_type: str) -> None:
    """Make the implementations for a device available; builds them at the first use on a machine.

    Raises RanaError for a device without kernels.
    """
    if not is_supported(device_type):
        raise RanaError(f"no masked kernels for device {device_type!r}; known: {', '.join(_LOADERS)}")
    with _LOCK:
        _register(device_type)


@cache
def _register(device_type: str) -> None:
    import_module(_LOADERS[device_type]).register()
