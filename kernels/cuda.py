"""Triton kernels for few rows (decode) on CUDA devices. Semantics: reference.py; the programs: triton_programs.py.

One launch a product where the output is wide enough for every multiprocessor; else the reduction is split too, and a
second small kernel adds the parts in a fixed order. No atomics, no host synchronisation: results do not vary,
and CUDA graphs may capture the launches. How the work is cut is measured once per shape and device model, and kept in
the cache directory of the CPU kernels.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from rana_compile.kernels import triton_programs as programs
from rana_compile.kernels.cpu import cache_directory
from rana_compile.kernels.ops import DTYPES, LIBRARY
from rana_compile.kernels.reference import apply_threshold, check_activation, gated
from rana_compile.types import RanaError

log = logging.getLogger(__name__)

MAX_ROWS = 2  # input rows that share one pass over the weight; for more the library is faster, whatever is skipped


class Tile(NamedTuple):
    """How ``masked_gemv`` cuts its work."""

    columns: int  # per program
    depth: int  # loads in flight per thread
    warps: int  # per program
    split: int  # parts of the rows


TILES = (
    Tile(32, 4, 32, 1),
    Tile(32, 8, 16, 1),
    Tile(64, 8, 2, 16),
    Tile(64, 4, 32, 2),
    Tile(32, 8, 8, 1),
    Tile(64, 2, 16, 1),
    Tile(32, 4, 16, 1),
    Tile(32, 4, 16, 4),
    Tile(32, 4, 4, 1),
)
_measured: dict[tuple[Any, ...], Tile] = {}  # per shape, dtype and device


def register() -> None:
    """Make these the implementations of ``torch.ops.rana.*`` on CUDA."""
    for op in (linear, masked_linear, rank_linear, gated_mlp):
        LIBRARY.impl(op.__name__, op, "CUDA")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Dense product: x [..., d_in], weight [d_out, d_in] -> [..., d_out]."""
    _check(x, weight, weight.shape[-1], weight.shape[0], bias)
    d_out, d = weight.shape
    if x.numel() != d or not weight.numel():  # only one row is worth a kernel of our own
        return F.linear(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], d_out))
    block_k = min(4096, triton.next_power_of_2(d))
    block_n = 4096 // block_k
    grid = (triton.cdiv(d_out, block_n),)
    shape = {"D": d, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8}
    _launch(programs.gemv, grid, x.contiguous(), weight, bias, out, d_out, **shape)
    return out


def masked_linear(z: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Masked product: z [..., d], threshold [d], weight_t [d, d_out] -> [..., d_out]."""
    return _masked(z, threshold, weight_t, bias, None)


def rank_linear(x: Tensor, basis: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense product, then a masked one: x [..., d_in], basis [r, d_in], weight_t [r, d_out] -> [..., d_out]."""
    return _masked(linear(x, basis), threshold, weight_t, bias, None)


def gated_mlp(
    x: Tensor,
    up_threshold: Tensor,
    up_weight_t: Tensor,
    up_bias: Tensor | None,
    down_threshold: Tensor,
    down_weight_t: Tensor,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Both products of a gated MLP masked: x [..., d_in], up_weight_t [d_in, 2h], down_weight_t [h, d_out]."""
    check_activation(activation)
    hidden = _masked(x, up_threshold, up_weight_t, up_bias, activation)
    return _masked(hidden, down_threshold, down_weight_t, down_bias, None)


def _masked(z: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The masked product, one launch or two; with an activation, of gate columns then up columns, combined."""
    _check(z, weight_t, weight_t.shape[0], weight_t.shape[-1], bias)
    d, ld = weight_t.shape
    if threshold.dtype != torch.float32 or threshold.shape != (d,) or not threshold.is_contiguous():
        raise RanaError(
            f"expected a contiguous float32 threshold of {d} elements, got {tuple(threshold.shape)} of "
            f"{threshold.dtype}"
        )
    cols = ld // 2 if activation else ld
    rows = z.numel() // d if d else 0
    if not rows * cols or rows > MAX_ROWS:
        y = F.linear(apply_threshold(z, threshold), weight_t.t(), bias)
        return gated(y, activation) if activation else y
    out = z.new_empty((*z.shape[:-1], cols))
    tile = _tile(z, rows, d, cols, activation)
    _run(tile, z.contiguous(), threshold, weight_t, bias, out, rows, cols, activation)
    return out


def _run(
    tile: Tile,
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rows: int,
    cols: int,
    activation: str | None,
) -> None:
    d, ld = weight_t.shape
    split = tile.split
    sums = out if split == 1 else z.new_empty((split, rows, ld), dtype=torch.float32)
    shared = {"ACTIVATION": activation, "SPLIT": split}
    config = {"BLOCK_N": tile.columns, "DEPTH": tile.depth, "WARPS": tile.warps, "num_warps": tile.warps}
    grid = (triton.cdiv(cols, tile.columns), split)
    args = (z, threshold, weight_t, bias, sums, d, cols, ld)
    _launch(programs.masked_gemv, grid, *args, BATCH=rows, PART=triton.cdiv(d, split), **shared, **config)
    if split > 1:
        _launch(
            programs.add_parts, (triton.cdiv(cols, 128), rows), sums, bias, out, rows, cols, ld, BLOCK_N=128, **shared
        )


def _tile(z: Tensor, rows: int, d: int, cols: int, activation: str | None) -> Tile:
    """The fastest tile for a shape, measured once per device model; a usual one if it is small or a graph captured."""
    gate = activation is not None
    if z.device.type != "cuda" or d * cols * z.element_size() < 2**20:
        return _usual_tile(rows, d, cols, gate)
    key = (rows, d, cols, gate, z.dtype, z.device)
    if key not in _measured:
        file = _tile_file(*key)
        if file.exists():
            _measured[key] = Tile(*json.loads(file.read_text()))
        elif torch.cuda.is_current_stream_capturing():
            return _usual_tile(rows, d, cols, gate)
        else:
            _measured[key] = _measure_tile(*key)
            _save(_measured[key], file)
    return _measured[key]


def _usual_tile(rows: int, d: int, cols: int, gate: bool) -> Tile:
    """About one program per multiprocessor, or as many as share one wave."""
    if rows > 1:
        return Tile(32, 4, 4 if gate else 16, 1)
    if gate:
        return Tile(64, 2, 16, 1)
    if cols <= 2048:
        return Tile(32, 4, 16, 4)
    if cols <= 6144:
        return Tile(32, 4, 32, 1) if d <= 8192 else Tile(64, 4, 32, 2)
    return Tile(32, 8, 8, 1)


def _tile_file(rows: int, d: int, cols: int, gate: bool, dtype: torch.dtype, device: torch.device) -> Path:
    of = (torch.cuda.get_device_name(device), triton.__version__, rows, d, cols, gate, dtype, TILES)
    return cache_directory() / f"tile_{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.json"


def _save(tile: Tile, file: Path) -> None:
    """Under a temporary name first, so that processes may race."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".json.tmp")
    with os.fdopen(handle, "w") as stream:
        json.dump(tile, stream)
    os.replace(temporary, file)


def _measure_tile(rows: int, d: int, cols: int, gate: bool, dtype: torch.dtype, device: torch.device) -> Tile:
    log.info("tuning the masked kernel for %d×%d×%d, %s", rows, d, cols, dtype)
    own: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    z = torch.randn(rows, d, dtype=dtype, **own)
    threshold = torch.where(torch.rand(d, **own) < 0.5, 0.0, torch.inf)  # half of the rows live, for all inputs
    weight_t = torch.randn(d, 2 * cols if gate else cols, dtype=dtype, **own)
    out = z.new_empty((rows, cols))
    activation = "silu" if gate else None

    def seconds(tile: Tile) -> float:
        try:
            return do_bench(
                lambda: _run(tile, z, threshold, weight_t, None, out, rows, cols, activation),
                warmup=2,
                rep=10,
                return_mode="median",
            )
        except OutOfResources:
            return math.inf

    return min((t for t in TILES if rows == 1 or t.depth * t.warps <= 64), key=seconds)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **config: Any) -> None:
    device = args[0].device
    if device.type != "cuda":  # under the interpreter
        kernel[grid](*args, PDL=False, **config)
        return
    with torch.cuda.device(device):
        if _overlaps(device):
            kernel[grid](*args, PDL=True, launch_pdl=True, **config)
        else:
            kernel[grid](*args, PDL=False, **config)


@cache
def _overlaps(device: torch.device) -> bool:
    """Whether the device starts a kernel's prologue while the one before it ends (programmatic dependent launch)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _check(x: Tensor, weight: Tensor, d_in: int, d_out: int, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() < 1:
        raise RanaError(
            f"expected an input of 1 or more dimensions and a weight of 2, got {x.dim()} and {weight.dim()}"
        )
    if x.shape[-1] != d_in:
        raise RanaError(f"the input has {x.shape[-1]} features, the weight expects {d_in}")
    if not weight.is_contiguous():
        raise RanaError("the weight must be contiguous; call .contiguous() on it once")
    if x.dtype != weight.dtype:
        raise RanaError(f"input and weight must share a dtype, got {x.dtype} and {weight.dtype}; convert one of them")
    if x.dtype not in DTYPES:
        raise RanaError(f"rana kernels take float32, bfloat16 and float16, got {x.dtype}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (d_out,) or not bias.is_contiguous()):
        raise RanaError(f"expected a contiguous bias of {d_out} elements of {x.dtype}")
