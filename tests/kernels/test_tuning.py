"""What was measured of the CUDA kernels is kept whole, and measured again where it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize(("slower_from", "most"), [(16, 0), (17, 16), (200, 128), (10**9, max(tuning.TOGETHER))])
def test_the_most_rows_for_which_one_product_is_faster(
    slower_from: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def microseconds(call: Callable[[int], Any], count: int) -> float:
        found = call(0)
        seen.append(found if isinstance(found, Tensor) else torch.cat(found, dim=-1))
        return max(seen[-1].shape[-2], slower_from) if isinstance(found, Tensor) else slower_from + 0.5 - (most == 0)

    monkeypatch.setattr(tuning, "_file", lambda case: tmp_path / "together.json")
    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    monkeypatch.setattr(tuning, "BEYOND_CACHES", 1)
    monkeypatch.setattr(tuning, "_known", {})
    stack = tuning.Stack(8, (6, 4, 2), torch.float32, torch.device("cpu"))
    assert tuning.measured_together(stack).cut == (most,)
    tuning._known.clear()
    count = len(seen)
    assert tuning.measured_together(stack).cut == (most,) and len(seen) == count  # from the file
    assert [t.shape[-1] for t in seen] == [12] * count
    assert [t.shape[:-1] for t in seen[:2]] == [(3, 16), (16,)]
