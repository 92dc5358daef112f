"""The Triton programs; ``cuda.py`` launches them.

A program owns a block of output columns and walks the live rows of ``weight_t``, or of one of SPLIT equal parts of it:

    z, threshold ─▶ list of live rows ─▶ loads of weight rows ─▶ float32 sums ─▶ bias ─▶ y

Parts of the columns may have masks of their own: a program's block lies in one part, whose threshold it looks up.

Each program makes its own list: that costs less than another launch. Without a list, skipped rows would still cost
the instructions of their loads and products, which is most of the time at low densities.
While the list is made, the first of its rows are already on their way to the second-level cache.
The loads of a later tile are issued in the loop's round before the one that multiplies it: within a round ptxas would
put each load next to its use, one in flight at a time.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton compiles no unpacking)

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
def _store(y, bias, out, at, n, valid):
    """Sums in float32 [BLOCK_N] -> outputs at ``out + at``."""
    if bias is not None:
        y += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _block(PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's part, its first column and the part's end. PARTS: each part's first block, column, and end."""
    block = tl.program_id(0)
    part = 0
    column = block * BLOCK_N
    end = PARTS[0][2]
    for p in tl.static_range(1, len(PARTS)):
        inside = block >= PARTS[p][0]
        part = tl.where(inside, p, part)
        column = tl.where(inside, PARTS[p][1] + (block - PARTS[p][0]) * BLOCK_N, column)
        end = tl.where(inside, PARTS[p][2], end)
    return part, column, end


@triton.jit
def _prefetch(at, wanted):
    """The cache lines at ``at`` to the second-level cache, where ``wanted``."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
        "=r,l,r",
        [at, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_first(block, ld, begin, end, COUNT: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr):
    """LINES cache lines of each of the COUNT first rows, those before ``end``."""
    if COUNT:
        row = begin + tl.arange(0, COUNT)
        lines = block + row.to(tl.int64)[:, None] * ld + tl.arange(0, LINES)[None, :] * LINE
        _prefetch(lines, tl.broadcast_to(row[:, None] < end, [COUNT, LINES]))


@triton.jit
def _level(ready, threshold, k, end, CHUNK: tl.constexpr, READY: tl.constexpr):
    """Thresholds at ``k``, of which those of the first READY chunks are there."""
    if CHUNK < READY:
        level = ready[CHUNK]
    else:
        level = tl.load(threshold + k, mask=k < end, other=float("inf"))
    return level


@triton.jit
def _list_live(
    z, threshold, scale, entries, block, d, ld, begin, end, masks,
    PART: tl.constexpr, BATCH: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The coordinates of [begin, end) that some row keeps -> entries [BATCH, PART]; returns how many.

    An entry is a coordinate's number (low half) and the float32 bits of a row's value, zero where only another row
    keeps it. NaN is kept. The list is in memory since Triton cannot scatter to shared memory; it stays in the caches.
    While the kernel before still runs, and the memory idles, the first EARLY rows of ``block`` are sent for, live or
    not; while the list is made, the live ones of the first AHEAD.
    """
    LINE: tl.constexpr = 1024 // block.dtype.element_ty.primitive_bitwidth  # elements of a cache line
    LINES: tl.constexpr = triton.cdiv(BLOCK_N, LINE)
    SENT: tl.constexpr = EARLY if PDL else 0
    CHUNK: tl.constexpr = min(triton.next_power_of_2(PART), WARPS * 256)
    CHUNKS: tl.constexpr = triton.cdiv(PART, CHUNK)
    READY: tl.constexpr = min(CHUNKS, 2)  # chunks whose thresholds are read before the wait: more would spill
    places = begin + tl.arange(0, CHUNK)
    thresholds = ()
    for c in tl.static_range(READY):
        k = places + c * CHUNK
        thresholds = thresholds + (tl.load(threshold + k, mask=k < end, other=float("inf")),)
    _prefetch_first(block, ld, begin, end, SENT, LINES, LINE)
    if PDL:  # neither thresholds nor weights come from the kernel before
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for c in tl.static_range(CHUNKS):
        k = places + c * CHUNK
        level = _level(thresholds, threshold, k, end, c, READY)
        live = k < 0
        values = ()
        for b in tl.static_range(BATCH):
            v = tl.load(z + b * d + k, mask=k < end, other=0.0).to(tl.float32)
            size = tl.abs(v)
            if scale is not None:
                size *= tl.load(scale + b * masks)
            v = tl.where(size < level, 0.0, v)
            values = values + (v,)
            live = live | (v != 0.0)
        if c * CHUNK < AHEAD:
            for line in tl.static_range(LINES):
                wanted = live & (k >= begin + SENT) & (k < begin + AHEAD)
                _prefetch(block + k.to(tl.int64) * ld + line * LINE, wanted)
        at = entries + tl.cumsum(live.to(tl.int32), 0) - 1
        found = tl.sum(live.to(tl.int32), 0)
        if c > 0:
            at += count  # noqa: F821
            found += count  # noqa: F821
        count = found
        for b in tl.static_range(BATCH):
            bits = values[b].to(tl.int32, bitcast=True)
            tl.store(at + b * PART, (bits.to(tl.int64) << 32) | k, mask=live)
    tl.debug_barrier()
    return count


@triton.jit
def _entry(entries, slot, count, PART: tl.constexpr, BATCH: tl.constexpr):
    """Numbers [ROWS] of the coordinates at ``slot``, -1 past the end, then BATCH tensors [ROWS] of their values."""
    result = ()
    for b in tl.static_range(BATCH):
        entry = tl.load(entries + b * PART + slot, mask=slot < count, other=0xFFFFFFFF)
        if b == 0:
            result = (entry.to(tl.int32),)
        result = result + ((entry >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
    return result


@triton.jit
def _rows(weight, entry, ld, valid):
    """The weight rows [ROWS, BLOCK_N] of an entry; where its number is -1 nothing is read."""
    k = entry[0]
    at = weight + (k.to(tl.uint32).to(tl.uint64) * tl.cast(ld, tl.uint32).to(tl.uint64))[:, None]  # one instruction
    return tl.load(at, mask=(k >= 0)[:, None] & valid[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _add(sums, w, entry, BATCH: tl.constexpr):
    """BATCH sums [ROWS, BLOCK_N], each with its products added."""
    result = ()
    for b in tl.static_range(BATCH):
        result = result + (sums[b] + w.to(tl.float32) * entry[1 + b][:, None],)
    return result


@triton.jit
def masked_gemv(
    z, threshold, scale, weight, bias, out, entries, d, ld,
    PARTS: tl.constexpr, SUMS: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
    BATCH: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, WARPS: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """z [BATCH, d], weight [d, ld] -> out [BATCH, ld], or if SUMS [splits, BATCH, ld] in float32 for ``add_parts``.

    PARTS (see ``_block``) are columns with a mask of their own each: threshold [parts, d], and, or None, scale
    [BATCH, parts], by which magnitudes are multiplied. ``entries`` [programs, BATCH, PART] is scratch. DEPTH tiles
    [ROWS, BLOCK_N] of the weight are in flight: each is multiplied just before its registers are loaded with the tile
    DEPTH further on, whose entries were read one round earlier still.
    """
    LANE: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth  # elements of a 16-byte load
    ROWS: tl.constexpr = max(1, WARPS * 32 * LANE // BLOCK_N)  # weight rows that the threads read together
    part, column, last = _block(PARTS, BLOCK_N)
    n = column + tl.arange(0, BLOCK_N)
    begin = tl.program_id(1) * PART
    end = tl.minimum(begin + PART, d)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    entries += program.to(tl.int64) * (BATCH * PART)
    threshold += part * d
    if scale is not None:
        scale += part
    valid = n < last
    at = weight + n[None, :]
    sums = ()
    for _ in tl.static_range(BATCH):
        sums = sums + (tl.zeros([ROWS, BLOCK_N], tl.float32),)
    block = weight + column
    count = _list_live(
        z, threshold, scale, entries, block, d, ld, begin, end, len(PARTS),
        PART, BATCH, WARPS, PDL, BLOCK_N, EARLY, AHEAD,
    )  # fmt: skip
    slot = tl.arange(0, ROWS)
    now = ()
    following = ()
    w = ()
    for i in tl.static_range(DEPTH):
        now = now + (_entry(entries, slot + i * ROWS, count, PART, BATCH),)
    for i in tl.static_range(DEPTH):
        following = following + (_entry(entries, slot + (DEPTH + i) * ROWS, count, PART, BATCH),)
    for i in tl.static_range(DEPTH):
        w = w + (_rows(at, now[i], ld, valid),)
    slot += 2 * DEPTH * ROWS
    for _ in range(0, count, DEPTH * ROWS):
        later = ()
        loaded = ()
        for i in tl.static_range(DEPTH):
            sums = _add(sums, w[i], now[i], BATCH)
            loaded = loaded + (_rows(at, following[i], ld, valid),)
            later = later + (_entry(entries, slot + i * ROWS, count, PART, BATCH),)
        slot += DEPTH * ROWS
        w = loaded
        now = following
        following = later
    for b in tl.static_range(BATCH):
        y = tl.sum(sums[b], axis=0)
        if SUMS:
            tl.store(out + (tl.program_id(1) * BATCH + b) * ld + n, y, mask=valid)
        else:
            _store(y, bias, out, b * ld + n, n, valid)


@triton.jit
def add_parts(
    parts, bias, out, rows, cols, ld,
    ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """parts [SPLIT, rows, ld] in float32 -> out [rows, cols]; with an activation, of gate columns then up columns."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < cols
    part = tl.arange(0, triton.next_power_of_2(SPLIT))[:, None]
    at = parts + (part * rows + row) * ld + n[None, :]
    read = (part < SPLIT) & valid[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(tl.load(at, mask=read, other=0.0), axis=0)
    if ACTIVATION is None:
        _store(y, bias, out, row * cols + n, n, valid)
    else:
        up = tl.sum(tl.load(at + cols, mask=read, other=0.0), axis=0)
        if bias is not None:
            y += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
            up += tl.load(bias + cols + n, mask=valid, other=0.0).to(tl.float32)
        dtype = out.dtype.element_ty
        gate = _activate(y.to(dtype).to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
        tl.store(out + row * cols + n, (gate * up.to(dtype).to(tl.float32)).to(dtype), mask=valid)


@triton.jit
def live_gemv(
    x, gate, threshold, scale, weight, bias, out, h,
    ACTIVATION: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row: x [d], gate [h], weight [h, d] -> out [h]; rows are read where abs(act(gate)) · scale is not small."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    level = tl.load(threshold + n, mask=n < h, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    g = tl.load(gate + n, mask=n < h, other=0.0)
    size = tl.abs(_activate(g.to(tl.float32), ACTIVATION).to(g.dtype).to(tl.float32))
    if scale is not None:
        size *= tl.load(scale)
    dead = size < level  # NaN is kept
    read = (n < h) & (dead == 0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    at = weight + n.to(tl.int64)[:, None] * D + k[None, :]
    for start in range(0, D, BLOCK_K):
        v = tl.load(x + start + k, mask=start + k < D, other=0.0).to(tl.float32)
        w = tl.load(at + start, mask=read[:, None] & (start + k < D)[None, :], other=0.0)
        acc += w.to(tl.float32) * v[None, :]
    y = tl.sum(acc, axis=1)
    if bias is not None:
        y += tl.load(bias + n, mask=n < h, other=0.0).to(tl.float32)
    tl.store(out + n, tl.where(dead, 0.0, y).to(out.dtype.element_ty), mask=n < h)


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
    _store(tl.sum(acc, axis=1), bias, out, n, n, n < d_out)
