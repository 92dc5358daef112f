"""The Triton kernels: under the interpreter without a GPU, compiled for three architectures, and on a GPU if there is.

The interpreter must be chosen before Triton is imported, so its tests run in processes of their own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rana_compile.kernels import reference

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HERE = Path(__file__).parent
on_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="test_under_the_interpreter runs it in another process"
)
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
offline = pytest.mark.skipif(INTERPRETED, reason="interpreted functions have no machine code")


@offline
@pytest.mark.parametrize("which", ["interpreted and (masked or linear-)", "interpreted and gated", "tile"])
def test_under_the_interpreter(which: str) -> None:
    files = [str(HERE / name) for name in ("test_ops.py", "test_triton.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:benchmark",
        "-k",
        which,
        *files,
    ]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout[-2000:]


@on_kernels
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 2])
def test_activations_and_tiles(rows: int, activation: str | None) -> None:
    from rana_compile.kernels import cuda
    from rana_compile.kernels.tuning import CUTS, USUAL, Case, Tile

    d, ld = 600, 100  # three lists to a program of one warp
    cols = ld // 2 if activation else ld
    z, threshold = torch.randn(rows, d, device=DEVICE), torch.rand(d, device=DEVICE)
    weight_t, bias = torch.randn(d, ld, device=DEVICE) / 25, torch.randn(ld, device=DEVICE)
    expected = reference.masked_linear(z, threshold, weight_t, bias)
    if activation:
        expected = reference.gated(expected, activation)
    case = Case(rows, d, cols, activation is not None, z.dtype, z.device)
    cuts = CUTS if activation in (None, "silu") else ()
    for tile in (USUAL, *(Tile(*cut, split) for cut in cuts for split in (1, 5))):
        out = torch.full((rows, cols), torch.nan, device=DEVICE)
        cuda._run(tile, case, z, threshold, weight_t, out, bias, activation or "silu")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@on_kernels
@pytest.mark.parametrize("parts", [(130,), (60, 33, 7), (1, 0, 130)])
@pytest.mark.parametrize("rows", [1, 2])
def test_parts_and_tiles(rows: int, parts: tuple[int, ...]) -> None:
    """Nothing, everything or one coordinate live in a part; parts that end within a block, and an empty one."""
    from rana_compile.kernels import cuda
    from rana_compile.kernels.tuning import CUTS, USUAL, Case, Tile

    d, ld = 150, sum(parts)
    levels = torch.stack([torch.full((d,), torch.inf), torch.zeros(d), torch.full((d,), torch.inf)])[-len(parts) :]
    levels[-1, 17] = 0.0
    threshold, scale = levels.to(DEVICE), torch.rand(rows, len(parts), device=DEVICE) + 0.5
    z, weight_t = torch.randn(rows, d, device=DEVICE), torch.randn(d, ld, device=DEVICE) / 17
    expected = reference.masked_linear(z, threshold, weight_t, None, parts, scale)
    case = Case(rows, d, ld, False, z.dtype, z.device)
    for tile in (USUAL, *(Tile(*cut, 5 if rows == 1 else 1) for cut in CUTS)):
        poison = [torch.full((n,), torch.nan, device=DEVICE) for n in (rows * ld, 5 * rows * ld, 320, 640) * 2]
        del poison  # the allocator likes to give freed memory again
        out = torch.full((rows, ld), torch.nan, device=DEVICE)
        cuda._run(tile, case, z, threshold, weight_t, out, parts=parts, scale=scale)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


MASKED = {
    "z": "*T",
    "threshold": "*fp32",
    "scale": "*fp32",
    "weight": "*T",
    "bias": "*T",
    "out": "*T",
    "entries": "*i64",
    "d": "i32",
    "ld": "i32",
}
PARTS = {"parts": "*fp32", "bias": "*T", "out": "*T", "rows": "i32", "cols": "i32", "ld": "i32"}
LIVE = {"x": "*T", "gate": "*T", "threshold": "*fp32", "scale": "*fp32"} | {
    "weight": "*T",
    "bias": "*T",
    "out": "*T",
    "h": "i32",
}
DENSE = {"x": "*T", "weight": "*T", "bias": "*T", "out": "*T", "d_out": "i32"}


def machine_code(
    architecture: int, name: str, types: dict[str, str], dtype: str, warps: int, **constants: Any
) -> bytes:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rana_compile.kernels import triton_programs

    program = getattr(triton_programs, name)
    constants["PDL"] = architecture >= 90
    places = {argument: (i,) for i, argument in enumerate(program.arg_names)}
    source = ASTSource(
        program,
        {argument: types.get(argument, "constexpr").replace("T", dtype) for argument in places},
        {places[argument]: value for argument, value in constants.items()},
        {places[argument]: [["tt.divisibility", 16]] for argument in types if argument not in ("rows", "scale")},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}).asm["cubin"]


def assert_no_spills(cubin: bytes, folder: Path, stack: int = 0) -> None:
    """Spilled registers, and arrays indexed at run time, live in local memory, on the stack of so many bytes."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"REG:[1-9]", usage), usage
    (used,) = re.findall(r"STACK:(\d+) .*LOCAL:0 ", usage)
    assert int(used) <= stack, usage


@offline
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 2])
def test_masked_gemv_compiles_without_spills(rows: int, dtype: str, architecture: int, tmp_path: Path) -> None:
    import triton

    from rana_compile.kernels.tuning import CUTS, ROWS, Tile

    newer = (rows, dtype, architecture) == (2, "fp32", 90) and torch.torch_version.TorchVersion(triton.__version__) >= (
        3,
        8,
    )
    for tile in (Tile(*cut, 8) for cut in CUTS):
        blocks = ((0, 0, 4096), (32, 4096, 5120), (40, 5120, 6144))
        constants = {"PARTS": blocks, "SUMS": True, "PART": ROWS[-1], "BATCH": rows, "EARLY": 16, "AHEAD": 64}
        shape = {"BLOCK_N": tile.columns, "DEPTH": tile.depth, "WARPS": tile.warps}
        types = MASKED | {"out": "*fp32"}
        assert_no_spills(
            machine_code(architecture, "masked_gemv", types, dtype, tile.warps, **constants, **shape),
            tmp_path,
            stack=16 if newer else 0,  # of Triton 3.8, which takes all 128 registers
        )


@offline
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_the_other_programs_compile_without_spills(architecture: int, tmp_path: Path) -> None:
    for split, columns in ((43, 32), (200, 8)):
        parts = {"ACTIVATION": "gelu", "SPLIT": split, "BLOCK_N": columns}
        assert_no_spills(machine_code(architecture, "add_parts", PARTS, "fp16", 1, **parts), tmp_path)
    live = {"ACTIVATION": "silu", "D": 4096, "BLOCK_N": 4, "BLOCK_K": 1024}
    assert_no_spills(machine_code(architecture, "live_gemv", LIVE, "fp16", 4, **live), tmp_path)
    dense = {"D": 4096, "BLOCK_N": 1, "BLOCK_K": 4096}
    assert_no_spills(machine_code(architecture, "gemv", DENSE, "fp16", 8, **dense), tmp_path)


@on_gpu
def test_inside_a_cuda_graph() -> None:
    from rana_compile.kernels import ops

    ops.load("cuda")
    z, threshold = torch.randn(1, 512, device=DEVICE), torch.rand(512, device=DEVICE)
    weight_t = torch.randn(512, 2048, device=DEVICE)
    torch.ops.rana.masked_linear(z, threshold, weight_t, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.rana.masked_linear(z, threshold, weight_t, None)
    for _ in range(3):
        z.normal_()
        graph.replay()
        assert torch.equal(y, torch.ops.rana.masked_linear(z, threshold, weight_t, None))


@on_gpu
def test_measurements_are_kept_and_leave_the_random_numbers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rana_compile.kernels import cuda, tuning

    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    device = torch.empty(0, device=DEVICE).device
    case = tuning.Case(1, 1024, 1024, False, torch.bfloat16, device)
    before = torch.cuda.get_rng_state()
    found = tuning.measured(case, cuda._run)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert len(list(tmp_path.iterdir())) == 1
    tuning._known.clear()
    monkeypatch.setattr(tuning, "_measure", None)
    assert tuning.measured(case, cuda._run) == found
    assert tuning.tile_for(case, cuda._run) == found.cut


@on_gpu
def test_the_form_of_a_stack_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rana_compile.kernels import ops, tuning

    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})
    device = torch.empty(0, device=DEVICE).device
    before = torch.cuda.get_rng_state()
    form = ops.stack_form(100, 576, (576, 192, 192), torch.bfloat16, device)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert form in tuning.FORMS
    tuning._known.clear()
    monkeypatch.setattr(tuning, "_measure_stack", None)
    assert ops.stack_form(120, 576, (576, 192, 192), torch.bfloat16, device) == form
    assert len(list(tmp_path.iterdir())) == 1


def test_candidates_keep_the_device_busy_and_there_is_always_one() -> None:
    from rana_compile.kernels import tuning

    def splits(*shape: Any) -> list[int]:
        return [t.split for t in tuning.candidates(tuning.Case(*shape, torch.bfloat16, torch.device("cuda", 0)))]

    assert splits(1, 4096, 12288, False) == splits(2, 4096, 12288, False) == [16, 16, 8, 16]
    assert splits(1, 4096, 11008, True) == [8, 16, 8, 16, 4, 16]  # twice as many columns: programs of 256 rows too
    assert splits(1, 11008, 4096, False) == [43, 43, 22, 43]
    assert splits(1, 4096, 1024, False) == [64, 64, 64]  # too few columns: as many parts as there may be
    assert splits(1, 4096, 128256, False) == [4, 16] * 3  # more than enough: no program lists more than 1024 rows
    assert splits(1, 64, 48, False) == [1, 1, 1]


def test_times_between_the_measured_densities() -> None:
    from rana_compile.kernels.tuning import USUAL, Measured

    found = Measured(USUAL, half=10.0, full=18.0, dense=16.0)
    assert (found.masked(0.5), found.masked(1.0)) == (10.0, 18.0)
    assert found.masked(0.75) == pytest.approx(14.0)


@on_gpu
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_inside_a_compiled_model() -> None:
    from rana_compile.kernels import ops

    ops.load("cuda")
    threshold, weight_t = torch.rand(512, device=DEVICE), torch.randn(512, 2048, device=DEVICE) / 20

    def model(x: Tensor) -> Tensor:
        return torch.relu(torch.ops.rana.masked_linear(x + 1, threshold, weight_t, None)) * 2

    compiled: Callable[[Tensor], Tensor] = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 512, device=DEVICE)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=1e-5, atol=1e-5)
