"""What was measured of the CUDA kernels is kept whole, and measured again where it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from rana_compile.kernels import tuning
from rana_compile.kernels.tuning import Case, Measured, Tile

CASE = Case(1, 4096, 4096, False, torch.float16, torch.device("cuda", 0))


@pytest.mark.parametrize(
    "kept",
    [
        None,
        "",
        "[",
        "7",
        '[["a", 1, 1, 1], 1, 2, 3]',
        "[[1, 1, 1, 1], 1]",
        "[[1], 1, 2, 3]",
        "[[1, 1, 1, 1], 1, 2, []]",
        "[[1, 1, 1, 1], NaN, 2, 3]",
    ],
)
def test_a_file_that_is_not_whole_is_measured_again(
    kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, calls = tmp_path / "masked.json", []
    if kept is not None:
        file.write_text(kept)

    def measure(case: Case, run: object) -> Measured:
        calls.append(case)
        return Measured(Tile(64, 8, 1, 2), 1.5, 2.5, 3.5)

    monkeypatch.setattr(tuning, "_file", lambda case: file)
    monkeypatch.setattr(tuning, "_measure", measure)
    monkeypatch.setattr(tuning, "_known", {})
    found = tuning.measured(CASE, lambda *_: None)
    tuning._known.clear()  # as another process
    assert tuning.measured(CASE, lambda *_: None) == found == Measured(Tile(64, 8, 1, 2), 1.5, 2.5, 3.5)
    assert calls == [CASE] and [p.name for p in tmp_path.iterdir()] == ["masked.json"]
    assert tuning.tile_for(CASE, lambda *_: None) == Tile(64, 8, 1, 2)
    assert ("measuring again" in caplog.text) == (kept is not None)


@pytest.mark.parametrize(
    ("programs", "rows", "early"), [(1024, 128, 16), (1025, 128, 8), (10**6, 128, 0), (1, 3, 2), (1, 1, 0)]
)
def test_rows_fetched_early_stay_within_what_memory_gives_meanwhile(programs: int, rows: int, early: int) -> None:
    assert tuning.early_rows(programs, 256, rows) == early


TIMES = {"apart": 1.0, "together": 1.0, "batched": 1.0}  # of a stack, relative to one product each


@pytest.mark.parametrize(
    ("rows", "launch", "times", "form"),
    [
        (100, 0.0, TIMES, "apart"),
        (100, 0.0, TIMES | {"batched": 0.97}, "batched"),
        (100, 0.0, TIMES | {"batched": 0.97, "together": 0.9}, "together"),
        (100, 1e9, TIMES | {"together": 1.01}, "batched"),  # one kernel less
        (100, 1e9, TIMES | {"batched": 1.03, "together": 1.03}, "apart"),
        (5000, 0.0, TIMES | {"together": 0.1}, "apart"),  # it is not tried for so many
    ],
)
def test_a_stack_is_computed_in_the_form_that_is_fastest(
    rows: int, launch: float, times: dict[str, float], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def microseconds(call: Callable[[int], Any], count: int) -> float:
        seen[call.__name__] = call(0)
        return times[call.__name__]

    monkeypatch.setattr(tuning, "_file", lambda case: tmp_path / "stack.json")
    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    monkeypatch.setattr(tuning, "BEYOND_CACHES", 1)
    monkeypatch.setattr(tuning, "LAUNCH", launch)
    monkeypatch.setattr(tuning, "_known", {})
    stack = tuning.Stack(rows, 8, (6, 4, 4), torch.float32, torch.device("cpu"))
    assert tuning.form_of(stack) == form
    tuning._known.clear()
    measured = 128 if rows == 100 else 8192
    assert [y.shape for y in seen["apart"]] == [(measured, 6), (measured, 4), (measured, 4)]
    assert [y.shape for y in seen["batched"]] == [(measured, 6), (2, measured, 4)]
    assert ("together" in seen) == (rows == 100) and seen.get("together", torch.empty(3, 128, 14)).shape == (3, 128, 14)
    seen.clear()
    assert tuning.form_of(stack) == form and not seen  # from the file


def test_parts_of_other_widths_are_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(tuning, "_file", lambda case: tmp_path / "stack.json")
    monkeypatch.setattr(tuning, "_microseconds", lambda call, count: tried.append(call.__name__) or 1.0)
    monkeypatch.setattr(tuning, "BEYOND_CACHES", 1)
    monkeypatch.setattr(tuning, "_known", {})
    tuning.form_of(tuning.Stack(20, 8, (6, 4, 6), torch.float32, torch.device("cpu")))
    assert tried == ["apart", "together"]


@pytest.mark.parametrize("kept", [None, "[[7], 1.0, 1.0, 1.0]", "[[2], 1.0, 1.0, 1.0]"])
def test_without_the_memory_to_measure_a_stack_it_is_computed_one_by_one(
    kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(stack: tuning.Stack) -> Measured:
        raise torch.OutOfMemoryError("no memory")

    file = tmp_path / "stack.json"
    if kept is not None:
        file.write_text(kept)
    monkeypatch.setattr(tuning, "_file", lambda case: file)
    monkeypatch.setattr(tuning, "_measure_stack", measure)
    monkeypatch.setattr(tuning, "_known", {})
    form = tuning.form_of(tuning.Stack(20, 8, (6, 6), torch.float32, torch.device("cpu")))
    assert form == ("batched" if kept and "2" in kept else "apart")  # no form has the number 7
    assert file.exists() == (kept is not None)
