"""Each op at several densities against the library's dense product and the memory's bandwidth, on CPU or CUDA.

    python benchmarks/kernels.py --quick
    python benchmarks/kernels.py --device cuda --dtype bfloat16 --shapes llama-2-7b llama-3-8b --csv kernels.csv

A result is checked against the plain form before its speed is printed. Op and baseline are timed in turns, on weights
that take turns too, so that no cache holds one; on CUDA inside CUDA graphs. Bytes are those of the weights needed, "of
reads" is the share of what a plain streaming read reaches, which takes turns with them. Ratios are medians over turns.
"""

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from bandwidth import measured_bandwidth
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Shape
from torch import Tensor

from rana_compile.kernels import ops, reference

DENSITIES = tuple(i / 10 for i in range(1, 11))
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}  # of gated_mlp: three roundings
console = Console(width=150)

Call = Callable[[int], Tensor]  # the product with the i-th copy of the weights


@dataclass(frozen=True)
class Case:
    """An op ready to run, its plain form and the library's dense product of the same size."""

    op: str
    shape: str
    rows: int
    density: float
    run: Call
    plain: Callable[[], Tensor]
    dense: Call
    bytes_needed: float
    dense_bytes: float
    copies: int


@dataclass(frozen=True)
class Row:
    op: str
    shape: str
    rows: int
    density: float
    mb: float
    us: float
    gb_per_s: float
    of_bandwidth: float
    dense_us: float
    dense_of_bandwidth: float
    ratio: float


def main() -> None:
    settings = parse_arguments()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    ops.load(device.type)
    source = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)  # beyond any cache
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, torch {torch.__version__}, {settings.dtype}", end="")
    console.print(f": copies {measured_bandwidth(device) / 1e9:.0f} GB/s" if device.type == "cuda" else "")
    rows = [
        measure(case, device, dtype, source, settings.rounds)
        for model in settings.shapes
        for batch in settings.batch
        for case in cases(SHAPES[model], batch, settings.densities, device, dtype, settings.quick)
    ]
    console.print(table(rows))
    if settings.csv:
        with settings.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(map(astuple, rows))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="input rows")
    parser.add_argument("--rounds", type=int, default=7, help="turns of op and baseline")
    parser.add_argument("--quick", action="store_true", help="one small model, one density, no vocabulary")
    parser.add_argument("--csv", type=Path)
    settings = parser.parse_args()
    if settings.quick:
        settings.shapes, settings.densities = ["smollm2-135m"], [0.5]
    return settings


def cases(
    shape: Shape,
    rows: int,
    densities: list[float],
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
) -> Iterator[Case]:
    hidden, kv, inner, vocabulary = shape.hidden, shape.kv, shape.intermediate, shape.vocabulary
    outputs = {(hidden, hidden), (hidden, hidden + 2 * kv), (hidden, inner), (hidden, kv), (inner, hidden)}
    x = {d: torch.randn(rows, d, device=device, dtype=dtype) for d in (hidden, inner)}
    for d, d_out in sorted(outputs) + ([] if quick else [(hidden, vocabulary)]):
        weights = copies((d_out, d), device, dtype)
        yield linear_case(x[d], weights)
        if d_out != vocabulary or device.type == "cuda":
            weights_t = [w.t().contiguous() for w in weights]
            yield from (masked_case(x[d], weights, weights_t, density) for density in densities)
        if d_out == hidden + 2 * kv:
            parts = (hidden, kv, kv)
            yield from (masked_case(x[d], weights, weights_t, density, parts) for density in densities)
    weights = copies((hidden + 2 * kv, hidden), device, dtype)
    bases = copies((hidden // 2, hidden), device, dtype)
    weights_t = copies((hidden // 2, hidden + 2 * kv), device, dtype)
    yield from (rank_case(x[hidden], weights, bases, weights_t, density) for density in densities)
    ups, downs = copies((hidden, 2 * inner), device, dtype), copies((inner, hidden), device, dtype)
    yield from (gated_case(x[hidden], ups, downs, density) for density in densities)


def copies(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """As many equal random weights of this shape as no cache holds."""
    beyond_caches = 2**29 if device.type == "cuda" else 2**27
    size = shape[0] * shape[1] * dtype.itemsize
    first = torch.randn(shape, device=device, dtype=dtype) / math.sqrt(shape[1])
    return [first, *(first.clone() for _ in range(math.ceil(beyond_caches / size) - 1))]


def threshold_for(d: int, density: float, device: torch.device) -> Tensor:
    """Keeps ``density`` of the coordinates, at random places, whatever their values."""
    keep = torch.rand(d, device=device).argsort() < round(density * d)
    return torch.where(keep, 0.0, torch.inf)


def linear_case(x: Tensor, weights: list[Tensor]) -> Case:
    d_out, d = weights[0].shape
    n, size = len(weights), float(weights[0].nbytes)
    run: Call = lambda i: torch.ops.rana.linear(x, weights[i % n], None)  # noqa: E731
    dense: Call = lambda i: F.linear(x, weights[i % n])  # noqa: E731
    return Case(
        "linear", f"{d}→{d_out}", len(x), 1.0, run, lambda: reference.linear(x, weights[0]), dense, size, size, n
    )


def masked_case(
    x: Tensor, weights: list[Tensor], weights_t: list[Tensor], density: float, parts: tuple[int, ...] = ()
) -> Case:
    """With ``parts``, a mask for each of them, as q, k and v have."""
    d_out, d = weights[0].shape
    n, size = len(weights), float(weights[0].nbytes)
    masks = [threshold_for(d, density, x.device) for _ in parts or (d_out,)]
    threshold = torch.stack(masks) if parts else masks[0]
    return Case(
        op=f"masked_linear{f', {len(parts)} masks' if parts else ''}",
        shape=f"{d}→{d_out}",
        rows=len(x),
        density=density,
        run=lambda i: torch.ops.rana.masked_linear(x, threshold, weights_t[i % n], None, parts),
        plain=lambda: reference.masked_linear(x, threshold, weights_t[0], None, parts),
        dense=lambda i: F.linear(x, weights[i % n]),
        bytes_needed=density * size,
        dense_bytes=size,
        copies=n,
    )


def rank_case(x: Tensor, weights: list[Tensor], bases: list[Tensor], weights_t: list[Tensor], density: float) -> Case:
    (rank, d), d_out = bases[0].shape, weights[0].shape[0]
    n = len(weights)
    threshold = threshold_for(rank, density, x.device)
    return Case(
        op="rank_linear",
        shape=f"{d}→{rank}→{d_out}",
        rows=len(x),
        density=density,
        run=lambda i: torch.ops.rana.rank_linear(
            x, bases[i % len(bases)], threshold, weights_t[i % len(weights_t)], None
        ),
        plain=lambda: reference.rank_linear(x, bases[0], threshold, weights_t[0]),
        dense=lambda i: F.linear(x, weights[i % n]),
        bytes_needed=bases[0].nbytes + density * weights_t[0].nbytes,
        dense_bytes=weights[0].nbytes,
        copies=n,
    )


def gated_case(x: Tensor, ups: list[Tensor], downs: list[Tensor], density: float) -> Case:
    (d, both), inner = ups[0].shape, downs[0].shape[0]
    n, size = len(ups), float(ups[0].nbytes + downs[0].nbytes)
    first = torch.stack([threshold_for(d, density, x.device) for _ in range(2)])  # gate's and up's
    second = threshold_for(inner, density, x.device)

    def dense(i: int) -> Tensor:
        hidden = reference.gated(F.linear(x, ups[i % n].view(both, d)), "silu")
        return F.linear(hidden, downs[i % len(downs)].view(d, inner))

    return Case(
        op="gated_mlp",
        shape=f"{d}→2·{inner}→{d}",
        rows=len(x),
        density=density,
        run=lambda i: torch.ops.rana.gated_mlp(x, first, ups[i % n], None, second, downs[i % len(downs)], None, "silu"),
        plain=lambda: reference.gated_mlp(x, first, ups[0], None, second, downs[0], None, "silu"),
        dense=dense,
        bytes_needed=density * size,
        dense_bytes=size,
        copies=max(n, len(downs)),
    )


def measure(case: Case, device: torch.device, dtype: torch.dtype, source: Tensor, rounds: int) -> Row:
    """``source`` is read in turns with the op, since a shared machine's memory is not always as fast."""
    check(case, dtype)
    calls = max(case.copies, 8)
    times = timed([case.run, case.dense, reader(source, calls)], calls, device, rounds)
    turns = list(zip(*times, strict=True))
    seconds, dense, _ = map(statistics.median, times)
    per_call = source.numel() * source.element_size() / calls  # bytes
    return Row(
        case.op,
        case.shape,
        case.rows,
        case.density,
        case.bytes_needed / 1e6,
        seconds * 1e6,
        case.bytes_needed / seconds / 1e9,
        statistics.median(case.bytes_needed / per_call * read / own for own, _, read in turns),
        dense * 1e6,
        statistics.median(case.dense_bytes / per_call * read / other for _, other, read in turns),
        statistics.median(other / own for own, other, _ in turns),
    )


def reader(source: Tensor, parts: int) -> Call:
    """A plain streaming read; all ``parts`` calls together read ``source``."""
    chunks = source.tensor_split(parts)
    return lambda i: chunks[i % parts].amax() if source.is_cuda else chunks[i % parts].sum()


def check(case: Case, dtype: torch.dtype) -> None:
    expected = case.plain().float()
    error = float((case.run(0).float() - expected).norm() / expected.norm().clamp_min(1e-6))
    if not error <= ERROR[dtype]:
        sys.exit(f"{case.op} {case.shape} at density {case.density}: relative error {error:.2g}, no speed to report")


def timed(calls: list[Call], count: int, device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of a call of each, in turns, by round; ``count`` calls at a time."""
    runs = [graph_of(call, count) if device.type == "cuda" else loop_of(call, count) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for run, into in zip(runs, times, strict=True):
            into.append(run() / count)
    return [values[1:] for values in times]  # the first warmed up


def loop_of(call: Call, count: int) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        for i in range(count):
            call(i)
        return time.perf_counter() - begin

    return run


def graph_of(call: Call, count: int) -> Callable[[], float]:
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)

    def run() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return run


def table(rows: list[Row]) -> Table:
    result = Table("op", "shape", "rows", "density", "MB", "µs", "GB/s", "of reads", "dense µs", "of reads", "ratio")
    for row in rows:
        result.add_row(
            row.op,
            row.shape,
            str(row.rows),
            f"{row.density:.1f}",
            f"{row.mb:.1f}",
            f"{row.us:.1f}",
            f"{row.gb_per_s:.0f}",
            f"{row.of_bandwidth:.0%}",
            f"{row.dense_us:.1f}",
            f"{row.dense_of_bandwidth:.0%}",
            f"{row.ratio:.2f}×",
        )
    return result


if __name__ == "__main__":
    main()
