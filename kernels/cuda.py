"""Triton kernels for few rows (decode) on CUDA devices. Semantics: reference.py; the programs: triton_programs.py.

One launch a product where the output is wide enough for every multiprocessor; else the reduction is split too, and a
second small kernel adds the parts in a fixed order. No atomics, no host synchronisation: results do not vary,
and CUDA graphs may capture the launches. How the work is cut, and whether it pays: tuning.py.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rana_compile.kernels import reference, tuning
from rana_compile.kernels import triton_programs as programs
from rana_compile.kernels.ops import DTYPES, LIBRARY
from rana_compile.kernels.reference import apply_threshold, check_activation, gated, of_mask
from rana_compile.kernels.tuning import Case, Stack, Tile
from rana_compile.types import RanaError

MAX_ROWS = 2  # input rows that share one pass over the weight; for more the library is faster, whatever is skipped


def register() -> None:
    """Make these the implementations of ``torch.ops.rana.*`` on CUDA."""
    for op in (linear, masked_linear, rank_linear, gated_mlp, gated_up):
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


def masked_linear(
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    bias: Tensor | None = None,
    parts: Sequence[int] = (),
    scale: Tensor | None = None,
) -> Tensor:
    """Masked product: z [..., d], threshold [d], weight_t [d, d_out] -> [..., d_out]; the rest: reference.py."""
    if parts and (threshold.dim() != 2 or sum(parts) != weight_t.shape[1]):
        raise RanaError(
            f"expected thresholds [{len(parts)}, {weight_t.shape[0]}] and columns {tuple(parts)}, got "
            f"{tuple(threshold.shape)} and {weight_t.shape[1]} columns"
        )
    return _masked(z, threshold, weight_t, bias, tuple(parts), scale)


def rank_linear(x: Tensor, basis: Tensor, threshold: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense product, then a masked one: x [..., d_in], basis [r, d_in], weight_t [r, d_out] -> [..., d_out]."""
    return _masked(linear(x, basis), threshold, weight_t, bias)


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
    """Both products of a gated MLP masked: x [..., d_in], up_weight_t [d_in, 2h], down_weight_t [h, d_out]."""
    check_activation(activation)
    h = down_weight_t.shape[0]
    if up_weight_t.shape[-1] != 2 * h:
        raise RanaError(f"the first weight must have {2 * h} columns, gate and up, got {up_weight_t.shape[-1]}")
    parts = (h, h) if up_threshold.dim() == 2 else ()
    hidden = _masked(x, up_threshold, up_weight_t, up_bias, parts, up_scale, activation)
    return _masked(hidden, down_threshold.reshape(-1), down_weight_t, down_bias)


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
    """Rows of ``up`` only where the activated gate survives: x [..., d_in] -> gate, then up [..., 2h]."""
    check_activation(activation)
    h, d = up_weight.shape
    _check(x, up_weight, d, h, None)
    if gate_threshold.shape != (h,) or gate_threshold.dtype != torch.float32 or not gate_threshold.is_contiguous():
        raise RanaError(
            f"expected a contiguous float32 gate threshold of {h} elements, got {tuple(gate_threshold.shape)} of "
            f"{gate_threshold.dtype}"
        )
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (2 * h,)):
        raise RanaError(f"expected a bias of {2 * h} elements of {x.dtype}")
    _check_scale(scale, x, 2)
    if x.numel() != d or not h * d:
        return reference.gated_up(x, threshold, gate_weight_t, gate_threshold, up_weight, bias, activation, scale)
    biases = (None, None) if bias is None else bias.chunk(2)
    scales = (None, None) if scale is None else scale.split(1, dim=-1)  # of one row, and so contiguous
    gate = _masked(x, threshold, gate_weight_t, biases[0], scale=scales[0])
    up = torch.empty_like(gate)
    block_k = min(1024, triton.next_power_of_2(d))
    block_n = max(1, 4096 // block_k)
    grid = (triton.cdiv(h, block_n),)
    shape = {"ACTIVATION": activation, "D": d, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4}
    args = (x.contiguous(), gate, gate_threshold, scales[1], up_weight, biases[1], up, h)
    _launch(programs.live_gemv, grid, *args, **shape)
    return torch.cat([gate, up], dim=-1)


def _masked(
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    parts: tuple[int, ...] = (),
    scale: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The masked product, one launch or two; with an activation, of gate columns then up columns, combined."""
    _check(z, weight_t, weight_t.shape[0], weight_t.shape[-1], bias)
    d, width = weight_t.shape
    _check_masks(z, threshold, (len(parts), d) if parts else (d,), scale)
    cols = width // 2 if activation else width
    rows = z.numel() // d if d else 0
    if not rows * cols or rows > MAX_ROWS:
        y = _library(z, threshold, weight_t, bias, parts, scale)
        return gated(y, activation) if activation else y
    out = z.new_empty((*z.shape[:-1], cols))
    case = Case(rows, d, cols, activation is not None, z.dtype, z.device)
    tile = tuning.tile_for(case, _run)
    _run(tile, case, z.contiguous(), threshold, weight_t, out, bias, activation or "silu", parts, scale)
    return out


def _library(
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    parts: tuple[int, ...],
    scale: Tensor | None,
) -> Tensor:
    """The same in plain operations: for more rows than a kernel takes."""
    if not parts:
        return F.linear(apply_threshold(z, threshold, of_mask(scale, 0)), weight_t.t(), bias)
    biases = [None] * len(parts) if bias is None else bias.split(list(parts))
    each = enumerate(zip(threshold, weight_t.split(list(parts), dim=1), biases, strict=True))
    return torch.cat([F.linear(apply_threshold(z, t, of_mask(scale, i)), w.t(), b) for i, (t, w, b) in each], dim=-1)


def _run(
    tile: Tile,
    case: Case,
    z: Tensor,
    threshold: Tensor,
    weight_t: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    parts: tuple[int, ...] = (),
    scale: Tensor | None = None,
) -> None:
    rows, d, cols, gate = case[:4]
    ld, split = weight_t.stride(0), tile.split
    blocks = _blocks(parts or (weight_t.shape[1],), tile.columns)
    last, begin, end = blocks[-1]
    grid = (last + triton.cdiv(end - begin, tile.columns), split)
    part = 64 * triton.cdiv(d, 64 * split)  # every program's first row is aligned
    apart = gate or split > 1  # the sums are combined by another program
    entries = z.new_empty((grid[0] * split, rows, part), dtype=torch.int64)
    sums = z.new_empty((split, rows, ld), dtype=torch.float32) if apart else out
    args = (z, threshold, scale, weight_t, bias, sums, entries, d, ld)
    shape = {"PARTS": blocks, "SUMS": apart, "PART": part, "BATCH": rows}
    config = {"BLOCK_N": tile.columns, "DEPTH": tile.depth, "WARPS": tile.warps, "num_warps": tile.warps}
    ahead = {"EARLY": 0, "AHEAD": 0}  # the interpreter knows no assembly
    if z.is_cuda:
        row = tile.columns * z.itemsize
        ahead = {"EARLY": tuning.early_rows(grid[0] * split, row, part), "AHEAD": tuning.AHEAD_BYTES // row}
    _launch(programs.masked_gemv, grid, *args, **shape, **config, **ahead)
    if apart:
        block_n = max(1, min(32, 2048 // triton.next_power_of_2(split)))  # a warp's registers
        grid = (triton.cdiv(cols, block_n), rows)
        shared: dict[str, Any] = {"ACTIVATION": activation if gate else None, "SPLIT": split}
        _launch(programs.add_parts, grid, sums, bias, out, rows, cols, ld, BLOCK_N=block_n, num_warps=1, **shared)


def _blocks(parts: tuple[int, ...], columns: int) -> tuple[tuple[int, int, int], ...]:
    """Each part's first block, first column and end; a part without columns has no block."""
    block = column = 0
    found = []
    for part in parts:
        found.append((block, column, column + part))
        block += triton.cdiv(part, columns)
        column += part
    return tuple(found)


def linear_is_faster(rows: int | None, *_: Any) -> bool:
    """Whether the dense kernel beats the library's product: for one row, 1.1 to 1.8 times (docs/speed.md)."""
    return rows == 1


def masked_is_faster(
    rows: int | None,
    d: int,
    d_out: int,
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    gated: bool,
    before: int | None = None,
) -> bool:
    """Whether the masked kernel, with this share of the coordinates live in some row, beats the library's product.

    A dense product ``before`` it is the library's, or for one row faster, and changes nothing.
    """
    if rows is None or rows > MAX_ROWS:
        return False
    case = Case(rows, d, d_out // 2 if gated else d_out, gated, dtype, device)
    if tuning.is_small(case):
        return rows == 1
    with torch.cuda.device(device):
        found = tuning.measured(case, _run)
    return found.masked(density) < found.dense


def gated_is_faster(rows: int | None, *_: Any) -> bool:
    """Whether there is one row: live outputs that only one token agrees on."""
    return rows == 1


def stack_form(rows: int, d: int, d_outs: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """How the parts of a stack are computed fastest."""
    with torch.cuda.device(device):
        return tuning.form_of(Stack(rows, d, d_outs, dtype, device))


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


def _check_masks(z: Tensor, threshold: Tensor, shape: tuple[int, ...], scale: Tensor | None) -> None:
    if threshold.dtype != torch.float32 or threshold.shape != shape or not threshold.is_contiguous():
        raise RanaError(
            f"expected contiguous float32 thresholds {shape}, got {tuple(threshold.shape)} of {threshold.dtype}"
        )
    _check_scale(scale, z, shape[0] if len(shape) == 2 else 1)


def _check_scale(scale: Tensor | None, z: Tensor, masks: int) -> None:
    expected = (*z.shape[:-1], masks)
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != expected or not scale.is_contiguous()):
        raise RanaError(f"expected a contiguous float32 scale {expected}, got {tuple(scale.shape)} of {scale.dtype}")


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
