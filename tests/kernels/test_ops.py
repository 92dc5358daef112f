"""Every op, for every implementation that runs here, against the plain form in float64; and ``opcheck``.

To test another implementation of an op add it to ``IMPLEMENTATIONS``. "interpreted" are the Triton kernels on CPU
tensors: ``test_triton.py`` runs this file again with TRITON_INTERPRET=1 to get them.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rana_compile.kernels import ops, reference
from rana_compile.types import RanaError

# after a slash: with a mask for each part of the columns, and with magnitudes scaled for each row
OPS = (
    *("linear", "masked_linear", "masked_linear/parts", "masked_linear/scale", "rank_linear"),
    *("gated_mlp", "gated_mlp/parts", "gated_mlp/scale", "gated_up", "gated_up/scale"),
)
IMPLEMENTATIONS = [
    *((op, "reference") for op in OPS),
    *((op, "cpu") for op in OPS),
    *((op, "cuda") for op in OPS if torch.cuda.is_available()),
    *((op, "interpreted") for op in OPS if os.environ.get("TRITON_INTERPRET") == "1"),
]
each_implementation = pytest.mark.parametrize(("op", "where"), IMPLEMENTATIONS)

# Results are rounded once, after sums in float32 (rank_linear and gated_mlp: again between their products).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def implementation(op: str, where: str) -> Callable[..., Tensor]:
    op = op.partition("/")[0]
    if where == "reference":
        return getattr(reference, op)
    if where == "interpreted":
        from rana_compile.kernels import cuda

        return getattr(cuda, op)
    ops.load(where)
    return getattr(torch.ops.rana, op)


def arguments(
    op: str, shape: tuple[int, int, int], dtype: torch.dtype, where: str = "cpu", keep: float = 0.5, bias: bool = True
) -> list[Any]:
    """Arguments for rows, d_in, d_out; every mask keeps about ``keep`` of its coordinates."""
    rows, d_in, d_out = shape
    device = "cuda" if where == "cuda" else "cpu"
    inner = 2 * d_in // 3 + 1  # the rank, or the hidden neurons

    def normal(*sizes: int) -> Tensor:
        return (torch.randn(*sizes) * max(1, sizes[0] if len(sizes) > 1 else 1) ** -0.5).to(dtype).to(device)

    def threshold(n: int, scale: float) -> Tensor:
        if keep in (0.0, 1.0):
            return torch.full((n,), 0.0 if keep else torch.inf, device=device)
        return (torch.rand(n).to(device) + 0.5) * scale * (1 - keep) * 1.35  # about half for keep = 0.5

    def maybe(n: int) -> Tensor | None:
        return torch.randn(n).to(dtype).to(device) if bias else None

    x = torch.randn(rows, d_in).to(dtype).to(device)
    both = lambda: torch.stack([threshold(d_in, 1.0), threshold(d_in, 0.5)])  # noqa: E731
    scale = lambda masks: torch.rand(rows, masks).to(device) + 0.5  # noqa: E731
    rank = lambda: [threshold(inner, 1.0), normal(inner, d_out), maybe(d_out)]  # noqa: E731
    down = lambda: [normal(inner, d_out), maybe(d_out), "silu"]  # noqa: E731
    up = lambda *levels: [levels[0], normal(d_in, 2 * inner), maybe(2 * inner), levels[1], *down()]  # noqa: E731
    rest: dict[str, Callable[[], list[Any]]] = {
        "linear": lambda: [normal(d_out, d_in), maybe(d_out)],
        "masked_linear": lambda: [threshold(d_in, 1.0), normal(d_in, d_out), maybe(d_out)],
        "masked_linear/parts": lambda: [both(), normal(d_in, d_out), maybe(d_out), [d_out // 3, d_out - d_out // 3]],
        "masked_linear/scale": lambda: [
            *(both(), normal(d_in, d_out), maybe(d_out), [d_out // 3, d_out - d_out // 3], scale(2)),
        ],
        "rank_linear": lambda: [normal(d_in, inner).t().contiguous(), *rank()],
        "gated_mlp": lambda: up(threshold(d_in, 1.0), threshold(inner, 0.3)),
        "gated_mlp/parts": lambda: up(both(), threshold(inner, 0.3)[None]),  # as plans store them
        "gated_mlp/scale": lambda: [*up(both(), threshold(inner, 0.3)[None]), scale(2)],
        "gated_up": lambda: [
            *(threshold(d_in, 1.0), normal(d_in, inner), threshold(inner, 0.3)),
            *(normal(d_in, inner).t().contiguous(), maybe(2 * inner), "silu"),
        ],
        "gated_up/scale": lambda: [*rest["gated_up"](), scale(2)],
    }
    return [x, *rest[op]()]


def check(op: str, where: str, args: list[Any]) -> None:
    """Relative error of the whole output, NaN in the same places, dtype and shape of the plain form."""
    y = implementation(op, where)(*args)
    dtype = args[0].dtype
    name = op.partition("/")[0]
    plain = getattr(reference, name)(*args)
    assert y.dtype == dtype and y.shape == plain.shape and y.device == args[0].device
    if name in ("linear", "masked_linear"):
        wide = (a.double() if isinstance(a, Tensor) and a.dtype == dtype else a for a in args)
        exact = getattr(reference, name)(*wide)
    else:
        exact = plain.double()  # a float64 product between the two would move the second mask
    assert torch.equal(y.isnan(), exact.isnan())
    error = (y.double() - exact).nan_to_num().norm() / exact.nan_to_num().norm().clamp_min(1e-6)
    allowed = TOLERANCE[dtype] if name in ("linear", "masked_linear") else 4 * TOLERANCE[dtype]
    if where == "interpreted" and dtype == torch.bfloat16:
        allowed *= 2  # the interpreter truncates to bfloat16
    assert error <= allowed


@each_dtype
@each_implementation
@pytest.mark.parametrize("shape", [(1, 96, 64), (1, 300, 77), (2, 64, 35), (5, 33, 48), (16, 40, 31), (29, 701, 70)])
def test_against_the_plain_form(op: str, where: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(op, where, arguments(op, shape, dtype, where))


@each_implementation
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 5, 1), (3, 1, 2), (0, 4, 3), (1, 17, 2049)])
def test_tiny_and_odd_shapes(op: str, where: str, shape: tuple[int, int, int]) -> None:
    check(op, where, arguments(op, shape, torch.float32, where, bias=False))


@each_dtype
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(12, 50, 64), (37, 1300, 65), (300, 45, 32), (260, 1, 1), (40, 0, 33)])
def test_many_rows(op: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Tiles on CPU: weights cut into panels and blocks that end where they like, more rows than one chunk takes."""
    check(op, "cpu", arguments(op, shape, dtype))


@each_implementation
@pytest.mark.parametrize("keep", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 23])
def test_nothing_and_everything_live(op: str, where: str, keep: float, rows: int) -> None:
    check(op, where, arguments(op, (rows, 70, 50), torch.float32, where, keep))


@each_implementation
def test_one_coordinate_live(op: str, where: str) -> None:
    args = arguments(op, (1, 70, 50), torch.float32, where, keep=0.0)
    for a in args:
        if isinstance(a, Tensor) and a.numel() and a.isinf().all():
            a[..., a.shape[-1] // 2] = 0.0
    check(op, where, args)


@each_implementation
def test_non_contiguous_inputs_and_more_dimensions(op: str, where: str) -> None:
    args = arguments(op, (6, 24, 10), torch.float32, where)
    flat = args[0]
    args[0] = flat.t().contiguous().t()
    check(op, where, args)
    scale = [args.pop()] if op.endswith("/scale") else []
    args[0] = flat.reshape(2, 3, 24)
    check(op, where, [*args, *(s.reshape(2, 3, -1) for s in scale)])
    args[0] = flat[0]
    check(op, where, [*args, *(s[0] for s in scale)])


@each_implementation
@pytest.mark.parametrize("rows", [3, 19])
def test_outputs_are_written_whole_and_nan_passes(op: str, where: str, rows: int) -> None:
    """The allocator likes to give freed memory again: fill it with NaN first."""
    args = arguments(op, (rows, 40, 50), torch.float32, where)
    for _ in range(3):
        poison = [torch.full((rows, n), torch.nan, device=args[0].device) for n in (27, 50, 54) for _ in range(4)]
        del poison
        check(op, where, args)
    args[0][1, 7] = torch.nan
    check(op, where, args)


SIZES = st.one_of(st.integers(0, 5), st.sampled_from([8, 15, 16, 17, 31, 33, 64, 127]), st.integers(1, 150))
LEVELS = st.lists(st.sampled_from([0.0, 0.3, 1.0, torch.inf, -1.0, torch.nan]), min_size=1, max_size=7)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not about Triton")
@pytest.mark.parametrize("op", OPS)
@given(
    shape=st.tuples(st.one_of(st.integers(0, 4), st.integers(0, 36)), SIZES, SIZES),
    dtype=st.sampled_from(list(TOLERANCE)),
    levels=LEVELS,
    bias=st.booleans(),
    activation=st.sampled_from(list(reference.ACTIVATIONS)),
    nans=st.integers(0, 2),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_mask_and_dtype(
    op: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    levels: list[float],
    bias: bool,
    activation: str,
    nans: int,
    seed: int,
) -> None:
    """Masks are any pattern of levels: all kept, none, some, and thresholds that are no numbers, which keep."""
    torch.manual_seed(seed)
    args = arguments(op, shape, dtype, bias=bias)
    names = [a.name for a in getattr(torch.ops.rana, op.partition("/")[0]).default._schema.arguments]
    args = [with_levels(a, levels) if "threshold" in n else a for n, a in zip(names, args, strict=False)]
    args = [activation if isinstance(a, str) else a for a in args]
    for _ in range(nans if args[0].numel() else 0):
        args[0].view(-1)[int(torch.randint(args[0].numel(), ()))] = torch.nan
    check(op, "cpu", args)


def with_levels(threshold: Tensor, levels: list[float]) -> Tensor:
    pattern = torch.tensor(levels).repeat(threshold.numel() // len(levels) + 1)[: threshold.numel()]
    return pattern[torch.randperm(len(pattern))].reshape(threshold.shape)


@pytest.mark.parametrize("where", [where for op, where in IMPLEMENTATIONS if (op, where) == ("masked_linear", where)])
def test_skipped_rows_are_not_read(where: str) -> None:
    if where == "reference":
        pytest.skip("the plain form multiplies them by zero")
    z, threshold, weight_t, bias = arguments("masked_linear", (1, 100, 70), torch.float32, where)
    skipped = z[0].abs() < threshold
    expected = implementation("masked_linear", where)(z, threshold, weight_t, bias)
    weight_t[skipped] = torch.nan
    assert 0 < skipped.sum() < 100
    assert torch.equal(implementation("masked_linear", where)(z, threshold, weight_t, bias), expected)


@each_implementation
@pytest.mark.parametrize("rows", [2, 23])
def test_repeats_bit_for_bit(op: str, where: str, rows: int) -> None:
    args = arguments(op, (rows, 513, 130), torch.bfloat16, where)
    run = implementation(op, where)
    first = run(*args)
    assert all(torch.equal(run(*args), first) for _ in range(3))


@each_dtype
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [1, 9, 41])
def test_threads_change_no_bit(op: str, dtype: torch.dtype, rows: int) -> None:
    args = arguments(op, (rows, 513, 1030), dtype)
    run, threads = implementation(op, "cpu"), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("op", "where"), [pair for pair in IMPLEMENTATIONS if pair[1] != "reference"])
def test_wrong_arguments_are_errors(op: str, where: str) -> None:
    good = arguments(op, (1, 16, 8), torch.bfloat16, where)
    run = implementation(op, where)
    weights = [
        i for i, a in enumerate(good) if isinstance(a, Tensor) and a.dim() == 2 and a.dtype == good[0].dtype and i
    ]
    for i in weights:
        wide = good[i].repeat(1, 2)
        for wrong in (good[i].float(), wide.repeat(2, 1), good[i].t().contiguous().t(), wide[:, : good[i].shape[1]]):
            with pytest.raises((RuntimeError, RanaError)):
                run(*good[:i], wrong, *good[i + 1 :])
    others = [i for i, a in enumerate(good) if isinstance(a, Tensor) and i > 0 and i not in weights]
    for i in others:  # thresholds, biases, scales
        for wrong in (good[i].double(), good[i][..., :-1]):
            with pytest.raises((RuntimeError, RanaError)):
                run(*good[:i], wrong, *good[i + 1 :])


@pytest.mark.parametrize(("op", "where"), [pair for pair in IMPLEMENTATIONS if pair[1] in ("cpu", "cuda")])
@pytest.mark.parametrize("rows", [1, 3])
def test_opcheck(op: str, where: str, rows: int) -> None:
    ops.load(where)
    torch.library.opcheck(implementation(op, where).default, arguments(op, (rows, 24, 10), torch.float32, where))


@pytest.mark.parametrize("op", OPS)
def test_shape_rule(op: str) -> None:
    """Fake tensors get the shape and dtype of the plain form, without an implementation for their device."""
    args = arguments(op, (2, 12, 6), torch.bfloat16, "reference")
    plain = implementation(op, "reference")(*args)
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    shaped = getattr(torch.ops.rana, op.partition("/")[0])(*meta)
    assert (shaped.shape, shaped.dtype) == (plain.shape, plain.dtype)


def test_an_unknown_activation_is_an_error_without_running() -> None:
    args = arguments("gated_mlp", (1, 12, 6), torch.float32, "reference")
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args[:-1]]
    with pytest.raises(RanaError, match="'swish'; known: silu"):
        torch.ops.rana.gated_mlp(*meta, "swish")


@pytest.mark.parametrize(
    ("rows", "d", "d_outs", "dtype", "device"),
    [
        (20, 12, (6, 4, 4), torch.float32, "cpu"),  # multiply-adds are the limit
        # nothing is measured there:
        (20, 12, (6,), torch.float32, "cuda"),
        (20, 12, (0, 0), torch.float32, "cuda"),
        (20, 0, (6, 4), torch.float32, "cuda"),
        (1, 12, (6, 4), torch.float32, "cuda"),
        (None, 12, (6, 4), torch.float32, "cuda"),
        (20, 12, (6, 4), torch.float64, "cuda"),
        (20, 12, (6, 4), torch.float32, "meta"),
    ],
)
def test_parts_stay_apart_where_nothing_else_can_pay(
    rows: int | None, d: int, d_outs: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    assert ops.stack_form(rows, d, d_outs, dtype, torch.device(device)) == "apart"


def test_a_device_without_kernels_is_an_error() -> None:
    assert not ops.is_supported("xpu")
    with pytest.raises(RanaError, match="'xpu'; known: cpu, cuda"):
        ops.load("xpu")
