"""A calibration that was killed goes on from its file and gives the plan it would have given."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens
from torch import nn

import rana_compile
from rana_compile.calibration import calibration
from rana_compile.checkpoint import Checkpoint
from rana_compile.correction import Target
from rana_compile.passes.record import Recorder


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when the (count + 1)-th batch has been recorded and not been written."""
    keep = Checkpoint.keep

    def dying(self: Checkpoint, batches: int, *args: Any, **kwargs: Any) -> None:
        if batches > count:
            raise Killed
        keep(self, batches, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "keep", dying)


def bytes_of(model: nn.Module, path: Path, checkpoint: Checkpoint | None = None, seed: int = 0) -> bytes:
    with calibration(model, tokens(8), seed=seed, progress=False, checkpoint=checkpoint) as session:
        session.fit(Target("flops", 0.6)).save(path)
    return path.read_bytes()


@pytest.mark.parametrize("recorded", [4, 6])  # of 6 batches, and then killed while fitting
def test_goes_on_to_the_same_bytes(recorded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rana_compile.checkpoint.PATIENCE", 0.0)
    model, file = tiny_llama(), tmp_path / "recording"
    whole = bytes_of(model, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupted_after(recorded, patch)
        if recorded == 6:
            patch.setattr("rana_compile.correction.Fitter.search", lambda *_: (_ for _ in ()).throw(Killed))
        bytes_of(model, tmp_path / "none", Checkpoint(file, every=0))
    assert file.exists() and not (tmp_path / "none").exists()
    torch._dynamo.reset()
    calls: list[int] = []
    record = Recorder.__call__

    def counting(self: Recorder, site: Any, *args: Any) -> Any:
        calls.append(site.kind == "down")
        return record(self, site, *args)

    monkeypatch.setattr(Recorder, "__call__", counting)
    assert bytes_of(model, tmp_path / "again", Checkpoint(file, every=0)) == whole
    assert sum(calls) == 2 * (6 - recorded)  # two layers, the batches that were left
    assert not file.exists()


def test_a_recording_of_other_weights_data_or_settings_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = tiny_llama(), tmp_path / "recording"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupted_after(3, patch)
        bytes_of(model, tmp_path / "none", Checkpoint(file, every=0))
    old = file.read_bytes()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    changed = bytes_of(model, tmp_path / "plain")
    assert bytes_of(model, tmp_path / "given", Checkpoint(file)) == changed
    file.write_bytes(old)
    bytes_of(model, tmp_path / "seed", Checkpoint(file), seed=1)
    file.write_bytes(old[:-9])
    bytes_of(model, tmp_path / "damaged", Checkpoint(file))
    messages = [m for m in caplog.messages if "recording from the start" in m]
    assert len(messages) == 3 and "not a readable recording" in messages[2]


def test_writes_are_spaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    checkpoint = Checkpoint(tmp_path / "recording", every=1000)
    recorder, generator = Recorder(lambda: 4, 0), torch.Generator()
    checkpoint.keep(1, recorder, generator)
    assert not (tmp_path / "recording").exists()
    checkpoint.keep(2, recorder, generator, last=True)
    assert checkpoint.restore("", recorder, generator) == 2


def test_calibrate_takes_a_path_and_leaves_nothing(tmp_path: Path) -> None:
    rana_compile.calibrate(tiny_llama(), tokens(3), 0.7, "neuron", progress=False, checkpoint=tmp_path / "recording")
    assert list(tmp_path.iterdir()) == []
