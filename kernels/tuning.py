"""How the masked kernel cuts its work, and what it gains: measured once per shape and device model, kept on disk.

    Case ──candidates──▶ [Tile] ──timed in CUDA graphs──▶ Measured(the fastest, its times, the dense product's)

Times are of calls in a row on weights that take turns, so that no cache holds one: what decode sees.
"""

import hashlib
import logging
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from rana_compile.kernels.cpu import wanted_directory
from rana_compile.kernels.measured import Measured, kept
from rana_compile.kernels.reference import columns_of, runs

log = logging.getLogger(__name__)

BEYOND_CACHES = 2**28  # bytes of weights that take turns
SMALL = 2**20  # bytes of a weight below which launches, not bytes, are what costs
PROGRAMS = (1000, 2000)  # what keeps the memory busy on about 132 multiprocessors; each thousand takes 1.2 µs to start
ROWS = (64, 128, 256, 512, 1024)  # of the weight, of a program; more would not fit in registers
STACKED = (16, 8192)  # rows for which the forms of a stack are compared: powers of two
MULTIPLIED = 2048  # rows up to which all inputs may be multiplied with all columns
LAUNCH = 20.0  # microseconds in which a graph starts a kernel, about: of shorter ones, fewer are better
FEWER = 0.02  # share of a stack's time that fewer kernels may cost where these are short
COPY = 0.02  # share of it that they must save elsewhere, for the copy of the weights
LIST = 256  # rows that a warp lists at a time


class Tile(NamedTuple):
    """How ``masked_gemv`` cuts its work."""

    columns: int  # per program
    depth: int  # loads in flight per thread
    warps: int  # per program
    split: int  # parts of the rows


class Case(NamedTuple):
    """A masked product z [rows, d], weight_t [d, cols], or [d, 2 cols] if ``gate``."""

    rows: int
    d: int
    cols: int
    gate: bool
    dtype: torch.dtype
    device: torch.device


class Stack(NamedTuple):
    """Products of several inputs [rows, d], each with a weight [d_out, d] of its own."""

    rows: int
    d: int
    d_outs: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


FORMS = ("apart", "together", "batched")  # how the parts of a stack may be computed: ``ops.stack_form``
Run = Callable[[Tile, Case, Tensor, Tensor, Tensor, Tensor], None]  # z, threshold, weight_t, out

# Columns, depth, warps. Many small programs win: while some list, others load. Measured: CONTRIBUTING.md. A candidate
# costs seconds to compile; for several rows, more.
CUTS = ((128, 8, 1), (128, 10, 1), (64, 12, 1))
EARLY_BYTES = 2**22  # fetched by all programs, live or not, while the kernel before ends: a microsecond's reads
AHEAD_BYTES = 2**13  # of a program's first rows, of which the live ones are fetched while it makes its list
USUAL = Tile(32, 4, 4, 1)
_known: dict[Case | Stack, Measured] = {}


def tile_for(case: Case, run: Run) -> Tile:
    """The tile to launch with; an unmeasured one for small weights and while a CUDA graph is captured."""
    if is_small(case):
        return USUAL
    if case not in _known and not os.path.exists(_file(case)) and torch.cuda.is_current_stream_capturing():
        return next(candidates(case))
    return Tile(*measured(case, run).cut)


def is_small(case: Case) -> bool:
    """Whether measuring is of no use: too few bytes, or no CUDA device."""
    return case.device.type != "cuda" or case.d * case.cols * case.dtype.itemsize < SMALL


def measured(case: Case, run: Run) -> Measured:
    """What was measured for this shape, now or by an earlier process."""
    if case not in _known:
        _known[case] = kept(_file(case), lambda: _measure(case, run), len(Tile._fields))
    return _known[case]


def form_of(stack: Stack) -> str:
    """Which of the ``FORMS`` is the fastest for about so many rows."""
    least, most = STACKED
    stack = stack._replace(rows=min(max(triton.next_power_of_2(stack.rows), least), most))
    if stack not in _known:
        try:
            _known[stack] = kept(_file(stack), lambda: _measure_stack(stack), 1, range(len(FORMS)))
        except torch.OutOfMemoryError:
            log.warning("no memory to measure how %s are computed fastest: one by one", stack)
            return FORMS[0]
    return FORMS[_known[stack].cut[0]]


def candidates(case: Case) -> Iterator[Tile]:
    """Cuts into about as many programs as the multiprocessors take, or the nearest; of wide weights, short ones too."""
    width = 2 * case.cols if case.gate else case.cols
    splits = sorted({triton.cdiv(case.d, rows) for rows in ROWS})
    for columns, depth, warps in CUTS:
        blocks = triton.cdiv(width, columns)
        busy = [s for s in splits if PROGRAMS[0] <= blocks * s <= PROGRAMS[1]]
        nearest = min(splits, key=lambda s: abs(math.log(blocks * s / PROGRAMS[0])))
        short = triton.cdiv(case.d, LIST)
        chosen = {*(busy or [nearest]), *([short] if blocks * short > PROGRAMS[1] else [])}
        yield from (Tile(columns, depth, warps, s) for s in sorted(chosen))


def early_rows(programs: int, row_bytes: int, rows: int) -> int:
    """How many of its ``rows`` a program fetches before it knows which are live: a power of two, at most 16, or 0."""
    return next((n for n in (16, 8, 4, 2) if n <= rows and programs * n * row_bytes <= EARLY_BYTES), 0)


def _file(case: Case | Stack) -> Path:
    of: tuple[Any, ...] = (
        torch.cuda.get_device_name(case.device),
        triton.__version__,
        torch.__version__,
        tuple(case)[:-1],
    )
    if isinstance(case, Case):
        name, of = "masked", (*of, CUTS, PROGRAMS, ROWS, LIST, EARLY_BYTES, AHEAD_BYTES)
    else:
        name, of = "stack", (*of, FORMS, MULTIPLIED, LAUNCH, FEWER, COPY, torch.get_float32_matmul_precision())
    return wanted_directory() / f"{name}_{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}.json"


def _measure(case: Case, run: Run) -> Measured:
    log.info("measuring the masked kernel for %d rows, %d×%d, %s", case.rows, case.d, case.cols, case.dtype)
    rows, d, cols, gate, dtype, device = case
    own: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    width = 2 * cols if gate else cols
    copies = math.ceil(BEYOND_CACHES / (d * width * dtype.itemsize))
    weights = [torch.randn(d, width, dtype=dtype, **own) for _ in range(copies)]
    z = torch.randn(rows, d, dtype=dtype, **own)
    out = z.new_empty((rows, cols))
    count = max(8, copies)

    def masked(tile: Tile, density: float) -> float:
        live = torch.rand(d, **own) < density  # for every input
        threshold = torch.where(live, 0.0, torch.inf)
        try:
            return _microseconds(lambda i: run(tile, case, z, threshold, weights[i % copies], out), count)
        except OutOfResources:
            return math.inf

    times = {tile: masked(tile, 0.5) for tile in candidates(case)}
    best = min(times, key=times.__getitem__)
    dense = _microseconds(lambda i: F.linear(z, weights[i % copies].view(width, d)), count)
    return Measured(best, times[best], masked(best, 1.0), dense)


def _measure_stack(stack: Stack) -> Measured:
    """``cut``: the place of the best of the ``FORMS``; ``half`` and ``full``: its time; ``dense``: that of several."""
    log.info("measuring products of %d inputs of %d with %s outputs, %s", stack.rows, *stack[1:-1])
    rows, d, d_outs, dtype, device = stack
    own: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    copies = math.ceil(BEYOND_CACHES / (d * sum(d_outs) * dtype.itemsize))
    weights_t = [torch.randn(d, sum(d_outs), dtype=dtype, **own) for _ in range(copies)]
    weights = [[part.view(-1, d) for part in w.view(-1).split([n * d for n in d_outs])] for w in weights_t]
    z = torch.randn(len(d_outs), rows, d, dtype=dtype, **own)
    count = max(8, copies)

    def apart(i: int) -> list[Tensor]:
        return [F.linear(x, w) for x, w in zip(z, weights[i % copies], strict=True)]

    def together(i: int) -> Tensor:
        return z @ weights_t[i % copies]

    def batched(i: int) -> list[Tensor]:
        return [
            F.linear(z[first], weights[i % copies][first])
            if n == 1
            else torch.bmm(z[first : first + n], columns_of(weights_t[i % copies], d_outs, first, n))
            for first, n in runs(d_outs)
        ]

    dense = _microseconds(apart, count)
    times = [dense, math.inf, math.inf]
    if rows <= MULTIPLIED:
        times[1] = _microseconds(together, count)
    if len(list(runs(d_outs))) < len(d_outs):
        times[2] = _microseconds(batched, count)
    limit = dense * (1 + FEWER if dense / len(d_outs) < LAUNCH else 1 - COPY)
    best = min((i for i in (1, 2) if times[i] <= limit), key=times.__getitem__, default=0)
    return Measured((best,), times[best], times[best], dense)


def _microseconds(call: Callable[[int], Any], count: int) -> float:
    """Median time of a call, of ``count`` in a CUDA graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph would collect garbage each time
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(count):
                call(i)
        finally:
            graph.capture_end()
    times = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times[1:])
