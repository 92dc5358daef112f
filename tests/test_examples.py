"""The scripts of examples/ run, and every one of them ends up adapted."""

import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
from support import OLD_DYNAMO, OLD_TRANSFORMERS

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("generation", "text_pipeline", "fill_mask", "image_classification", "speech")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_and_calibrates_itself(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor itself is left out: what it does with these graphs is tested elsewhere, and takes minutes."""
    if (OLD_TRANSFORMERS or OLD_DYNAMO) and name == "speech":
        pytest.skip("Dynamo breaks Whisper where versions are this old, which then calibrates part by part")
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches: gm)
    caplog.set_level(logging.INFO, "rana_compile.self_calibration")
    path = EXAMPLES / f"{name}.py"
    runpy.run_path(str(path), run_name="__main__")
    lines = [line for line in caplog.messages if line.startswith("rana:")]
    assert len(lines) == 1 and "calibrated on" in lines[0], lines
    assert sum('backend="rana"' in line for line in path.read_text(encoding="utf-8").splitlines()) == 1


def test_scripts_are_the_ones_tested() -> None:
    found: set[Any] = {p.stem for p in EXAMPLES.glob("*.py") if 'backend="rana"' in p.read_text(encoding="utf-8")}
    elsewhere = {"demo", "architectures", "lm_eval_run"}  # make demo, test_architectures, test_interoperation
    elsewhere |= {"train_loop", "train_trainer", "train_ddp", "recover"}  # test_train_examples
    assert found - elsewhere == set(SCRIPTS)
