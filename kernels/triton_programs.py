"""The Triton programs; ``cuda.py`` launches them.

A program owns a block of output columns and walks the rows of ``weight_t``, or one of SPLIT equal parts of them:

    z, threshold ─▶ mask (registers) ─▶ predicated loads of weight rows ─▶ float32 sums ─▶ bias, activation ─▶ y

The loads of a later tile are issued in the loop's round before the one that multiplies it: within a round ptxas would
put each load next to its use, one in flight at a time.
"""
# mypy: ignore-errors
# ruff: noqa: C901, RUF005  (branches of constants cost nothing; Triton compiles no unpacking)

import triton
import triton.language as tl


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def _store(first, second, bias, out, at, n, valid, cols, ACTIVATION: tl.constexpr):
    """Sums in float32 [..., BLOCK_N] -> outputs at ``out + at``; if gated, ``first`` is the gate."""
    dtype = out.dtype.element_ty
    if bias is not None:
        first += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        if bias is not None:
            second += tl.load(bias + cols + n, mask=n < cols, other=0.0).to(tl.float32)
        gate = _activate(first.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
        first = gate * second.to(dtype).to(tl.float32)
    tl.store(out + at, first.to(dtype), mask=valid)


@triton.jit
def _coordinates(z, threshold, k, d, end, BATCH: tl.constexpr):
    """BATCH tensors [ROWS] of z in float32, the skipped coordinates as zeros; NaN is kept."""
    result = ()
    t = tl.load(threshold + k, mask=k < end, other=0.0)
    for b in tl.static_range(BATCH):
        v = tl.load(z + b * d + k, mask=k < end, other=0.0).to(tl.float32)
        result = result + (tl.where(tl.abs(v) < t, 0.0, v),)
    return result


@triton.jit
def _rows(at, v, valid, BATCH: tl.constexpr):
    """The weight rows at ``at`` [ROWS, BLOCK_N] that some coordinate needs; of the others not a byte is read."""
    live = v[0] != 0.0
    for b in tl.static_range(1, BATCH):
        live = live | (v[b] != 0.0)
    return tl.load(at, mask=live[:, None] & valid[None, :], other=0.0)


@triton.jit
def _add(sums, w, v, BATCH: tl.constexpr):
    """BATCH sums [ROWS, BLOCK_N], each with its products added."""
    result = ()
    for b in tl.static_range(BATCH):
        result = result + (sums[b] + w.to(tl.float32) * v[b][:, None],)
    return result


@triton.jit
def masked_gemv(
    z, threshold, weight, bias, out, d, cols, ld,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
    BATCH: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """z [BATCH, d], weight [d, ld] -> out [BATCH, cols], or sums [SPLIT, BATCH, ld] in float32 for ``add_parts``.

    DEPTH tiles [ROWS, BLOCK_N] of the weight are in flight: each is multiplied just before its registers are loaded
    with the tile DEPTH further on, whose coordinates were read one round earlier still.
    """
    LANE: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth  # elements of a 16-byte load
    ROWS: tl.constexpr = max(1, WARPS * 32 * LANE // BLOCK_N)  # weight rows that the threads read together
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * PART
    end = tl.minimum(begin + PART, d)
    k = begin + tl.arange(0, ROWS)
    valid = n < cols
    step = tl.cast(ld, tl.int64) * ROWS
    at = weight + k.to(tl.int64)[:, None] * ld + n[None, :]
    first = ()
    second = ()
    for _ in tl.static_range(BATCH):
        first = first + (tl.zeros([ROWS, BLOCK_N], tl.float32),)
        second = second + (tl.zeros([ROWS, BLOCK_N], tl.float32),)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    now = ()
    following = ()
    w = ()
    u = ()
    for i in tl.static_range(DEPTH):
        now = now + (_coordinates(z, threshold, k + i * ROWS, d, end, BATCH),)
    for i in tl.static_range(DEPTH):
        following = following + (_coordinates(z, threshold, k + (DEPTH + i) * ROWS, d, end, BATCH),)
    for i in tl.static_range(DEPTH):
        w = w + (_rows(at + i * step, now[i], valid, BATCH),)
        if ACTIVATION is not None:
            u = u + (_rows(at + cols + i * step, now[i], valid, BATCH),)
    k += 2 * DEPTH * ROWS
    for _ in range(0, PART, DEPTH * ROWS):
        at += DEPTH * step
        later = ()
        loaded = ()
        loaded_up = ()
        for i in tl.static_range(DEPTH):
            first = _add(first, w[i], now[i], BATCH)
            loaded = loaded + (_rows(at + i * step, following[i], valid, BATCH),)
            if ACTIVATION is not None:
                second = _add(second, u[i], now[i], BATCH)
                loaded_up = loaded_up + (_rows(at + cols + i * step, following[i], valid, BATCH),)
            later = later + (_coordinates(z, threshold, k + i * ROWS, d, end, BATCH),)
        k += DEPTH * ROWS
        w = loaded
        u = loaded_up
        now = following
        following = later
    for b in tl.static_range(BATCH):
        one = tl.sum(first[b], axis=0)
        two = tl.sum(second[b], axis=0)
        if SPLIT == 1:
            _store(one, two, bias, out, b * cols + n, n, valid, cols, ACTIVATION)
        else:
            place = out + (tl.program_id(1) * BATCH + b) * ld + n
            tl.store(place, one, mask=valid)
            if ACTIVATION is not None:
                tl.store(place + cols, two, mask=valid)


@triton.jit
def add_parts(
    parts, bias, out, rows, cols, ld,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts [SPLIT, rows, ld] in float32 -> out [rows, cols]."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = parts + (tl.arange(0, SPLIT)[:, None] * rows + row) * ld + n[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.sum(tl.load(at, mask=(n < cols)[None, :], other=0.0), axis=0)
    second = first
    if ACTIVATION is not None:
        second = tl.sum(tl.load(at + cols, mask=(n < cols)[None, :], other=0.0), axis=0)
    _store(first, second, bias, out, row * cols + n, n, n < cols, cols, ACTIVATION)


@triton.jit
def gemv(
    x, weight, bias, out, d_out,
    D: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row, dense: x [d], weight [d_out, d] -> out [d_out]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    at = weight + n.to(tl.int64)[:, None] * D + k[None, :]
    for start in range(0, D, BLOCK_K):
        v = tl.load(x + start + k, mask=start + k < D, other=0.0).to(tl.float32)
        w = tl.load(at + start, mask=(n < d_out)[:, None] & (start + k < D)[None, :], other=0.0)
        acc += w.to(tl.float32) * v[None, :]
    _store(tl.sum(acc, axis=1), None, bias, out, n, n, n < d_out, d_out, None)
