"""The CPU kernels' way onto a machine; what they compute is in test_ops.py."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rana_compile import RanaError, WriteError
from rana_compile.kernels import cpu, ops
from rana_compile.kernels.measured import Measured

SCRIPT = """
import torch
from rana_compile.kernels import ops
ops.load("cpu")
x, level, weight = torch.randn(2, 8), torch.full((8,), 0.3), torch.randn(6, 8)
up, down = torch.randn(8, 8), torch.randn(4, 6)
calls = {
    "linear": (x, weight, None),
    "masked_linear": (x, level, weight.t(), None),
    "rank_linear": (x, torch.eye(8), level, weight.t(), None),
    "gated_mlp": (x, level, up, None, level[:4], down, None, "silu"),
    "gated_up": (x, level, up[:, :4], level[:4], up[:4], None, "silu"),
}
assert set(calls) == set(ops.NAMES)
for name, arguments in calls.items():
    assert torch.isfinite(getattr(torch.ops.rana, name)(*arguments)).all(), name
"""


def test_without_a_compiler_every_op_runs_and_says_that_it_is_slow() -> None:
    environment = os.environ | {"PATH": "", "CXX": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found" in result.stderr


COMPILER = """#!/bin/sh
case "$*" in *--version*|*-print-file-name*) echo "a stand-in"; exit;; esac
for last in "$@"; do :; done
rm -f "$last"; echo half > "$last"; sleep $SECONDS_TO_BUILD; echo whole > "$last"; exit $STATUS
"""
BUILD = (
    "import sys; from pathlib import Path; from rana_compile.kernels import cpu; cpu.build(*map(Path, sys.argv[1:]))"
)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes a file in two steps, as slowly as it is told to."""
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(COMPILER)
    path.chmod(0o755)
    for name, value in {"CXX": str(path), "SECONDS_TO_BUILD": "0", "STATUS": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that were loaded, in order; ones whose text is not whole cannot be."""
    paths: list[Path] = []

    def load(path: Path) -> None:
        paths.append(Path(path))
        if Path(path).read_text() != "whole\n":
            raise OSError("file too short")

    monkeypatch.setattr(cpu.torch.ops, "load_library", load)
    return paths


def building(compiler: Path, library: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", BUILD, str(compiler), str(library)], start_new_session=True)


def test_a_killed_build_leaves_no_library_and_the_next_one_clears_up(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "cache" / "cpu.so"
    monkeypatch.setenv("SECONDS_TO_BUILD", "600")
    with building(compiler, library) as process:
        while not list(library.parent.glob(".cpu.so.*/cpu.so")):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not library.exists() and len(list(library.parent.iterdir())) == 1
    monkeypatch.setenv("SECONDS_TO_BUILD", "0")
    cpu.build(str(compiler), library)
    assert {p.name: p.read_text() for p in library.parent.iterdir()} == {"cpu.so": "whole\n"}


def test_processes_that_build_at_once_do_not_disturb_each_other(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECONDS_TO_BUILD", "1")
    library = tmp_path / "cache" / "cpu.so"
    processes = [building(compiler, library) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert {p.name: p.read_text() for p in library.parent.iterdir()} == {"cpu.so": "whole\n"}


def test_what_the_compiler_says_is_passed_on(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Path]
) -> None:
    monkeypatch.setenv("STATUS", "1")
    compiler.write_text(COMPILER.replace("exit $STATUS", "echo 'No space left on device' >&2; exit 1"))
    with pytest.raises(RanaError, match=r"(?s)could not build .*RANA_COMPILE_CACHE chooses another.*No space left"):
        cpu.register()
    assert loaded == [] and list((tmp_path / "cache").iterdir()) == []


def test_a_library_that_is_there_needs_no_place_to_write(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Path]
) -> None:
    cpu.register()
    monkeypatch.setattr(cpu, "check_writable", None)
    monkeypatch.setattr(cpu, "build", None)
    cpu.register()
    assert len(loaded) == 2 and len(set(loaded)) == 1


def test_a_library_that_was_cut_off_is_built_anew(
    compiler: Path, loaded: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    cpu.register()
    loaded[0].write_text("who")
    cpu.register()
    assert len(set(loaded)) == 1 and loaded[0].read_text() == "whole\n"
    assert "cannot be loaded (file too short): building it anew" in caplog.text


def test_a_cache_that_cannot_be_written_is_replaced_and_named_once(
    compiler: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cpu.tempfile, "tempdir", None)
    monkeypatch.setenv("RANA_COMPILE_CACHE", "/proc/none")
    for _ in range(2):
        cpu.register()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "cannot write '/proc/none/library'" in line and "built in" in line and "for this run only" in line
    assert loaded[0] == loaded[1] and loaded[0].is_relative_to(tmp_path)


def test_a_cache_that_may_not_be_searched_is_as_good_as_none(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Path]
) -> None:
    stat = os.stat

    def guarded(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if "locked" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path / "locked"))
    monkeypatch.setattr(cpu, "_usable", lambda path: tmp_path)
    monkeypatch.setattr("os.stat", guarded)
    cpu.register()
    assert [path.parent for path in loaded] == [tmp_path]


def test_no_place_to_write_at_all_is_an_error(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setenv("RANA_COMPILE_CACHE", "/proc/nothing")
    monkeypatch.setattr(cpu.tempfile, "mkdtemp", full)
    with pytest.raises(WriteError, match=r"temporary files cannot be written either \(No space left"):
        cpu.register()


@pytest.mark.parametrize(
    ("rows", "density", "measured", "faster"),
    [
        *((1, 1.0, None, True), (2, 0.5, 2, True), (4, 0.8, 4, True), (4, 1.0, 4, False), (17, 1.0, 32, False)),
        *((64, 0.5, 64, True), (65, 0.5, 128, True), (300, 0.5, 512, True), (5000, 0.5, 512, True)),
    ],
)
def test_the_masked_kernel_is_taken_where_it_was_measured_faster(
    rows: int, density: float, measured: int | None, faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measure(*of: Any) -> Measured:
        calls.append(of)
        return Measured((), 60.0, 110.0, 100.0)

    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_measure", measure)
    arguments = (512, 500, density, torch.float32, torch.device("cpu"), False)
    for _ in range(2):
        cpu._measured.cache_clear()  # as another process
        assert cpu.masked_is_faster(rows, *arguments) == faster
    assert calls == ([] if measured is None else [("masked_linear", measured, 512, 500, torch.float32)])


def test_a_dense_product_before_the_mask_has_to_be_faster_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(op: str, rows: int, d: int, d_out: int, dtype: torch.dtype) -> Measured:
        calls.append((op, rows, d, d_out))
        return Measured((), 60.0, 60.0, 100.0) if op == "masked_linear" else Measured((), 110.0, 110.0, 100.0)

    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_measure", measure)
    cpu._measured.cache_clear()
    arguments = (4, 512, 500, 0.5, torch.float32, torch.device("cpu"), False)
    assert cpu.masked_is_faster(*arguments)
    assert calls == [("masked_linear", 4, 512, 500)]
    assert not cpu.masked_is_faster(*arguments, before=640)
    assert calls[1:] == [("linear", 4, 640, 512)]
    cpu._measured.cache_clear()


def test_both_products_of_a_gate_have_to_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    times = {"masked_linear": Measured((), 60.0, 110.0, 100.0), "linear": Measured((), 90.0, 90.0, 100.0)}
    monkeypatch.setattr(cpu, "_measure", lambda op, *_: times[op])
    cpu._measured.cache_clear()
    given = (640, 512, 0.5, torch.float32, torch.device("cpu"))
    assert [ops.gated_is_faster(rows, *given) for rows in (0, 1, 2, 9, None)] == [False, True, True, False, False]
    times["linear"] = Measured((), 110.0, 110.0, 100.0)
    assert not ops.gated_is_faster(3, *given)
    cpu._measured.cache_clear()


@pytest.mark.parametrize(
    ("shares", "faster"),
    [((0.5, 0.7, 1.02), True), ((0.5, 0.7, 1.1), False), ((1.02, 1.01, 0.98), False), ((1.02, 0.9, 0.9), True)],
)
def test_a_number_of_rows_that_varies_takes_what_loses_next_to_nothing(
    shares: tuple[float, ...], faster: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_rows = dict(zip(cpu.ANY_ROWS, shares, strict=True))
    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_measure", lambda op, rows, *_: Measured((), *[100 * by_rows[rows]] * 2, 100.0))
    cpu._measured.cache_clear()
    assert ops.masked_is_faster(None, 512, 500, 0.5, torch.float32, torch.device("cpu")) == faster
    assert ops.linear_is_faster(None, 512, 500, torch.float32, torch.device("cpu")) == faster
    assert not ops.masked_is_faster(0, 512, 500, 0.5, torch.float32, torch.device("cpu"))
    cpu._measured.cache_clear()


def test_small_weights_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_measure", None)
    small = (64, 64, 0.5, torch.float32, torch.device("cpu"), False)
    assert cpu.masked_is_faster(1, *small) and not cpu.masked_is_faster(2, *small)
    assert cpu.linear_is_faster(1, 64, 64, torch.float32) and not cpu.linear_is_faster(2, 64, 64, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_time_is_measured_whatever_the_default_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BEYOND_CACHES", 2**21)  # a wide weight is measured in part
    ops.load("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for op in ("masked_linear", "linear"):
            found = cpu._measure(op, 2, 256, 5000, torch.bfloat16)
            assert found.cut == () and min(found[1:]) > 0 and (op == "masked_linear" or found.half == found.full)
    finally:
        torch.set_default_dtype(before)


def test_what_was_measured_is_read_where_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "_measure", lambda *_: Measured((), 1.0, 2.0, 3.0))
    given = (2, 512, 500, 0.5, torch.float32, torch.device("cpu"), False)
    cpu._measured.cache_clear()
    assert cpu.masked_is_faster(*given)
    (file,) = tmp_path.iterdir()
    cpu._measured.cache_clear()
    monkeypatch.setattr(cpu, "_measure", None)
    monkeypatch.setattr(cpu, "check_writable", None)
    assert cpu.masked_is_faster(*given) and list(tmp_path.iterdir()) == [file]


def test_where_nothing_may_be_written_it_is_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RANA_COMPILE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(cpu, "_measure", lambda *_: Measured((), 1.0, 2.0, 3.0))
    cpu._measured.cache_clear()
    assert cpu.masked_is_faster(2, 512, 500, 0.5, torch.float32, torch.device("cpu"), False)
    assert "measured again by the next process" in caplog.text
