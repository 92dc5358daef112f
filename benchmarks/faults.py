"""Kills: a process ends at any moment of what it does; what was there stays whole, the next run goes on from it."""

import re
import time
from pathlib import Path

from kills import finished, kill, killed_after, moments, started, succeeds, temporaries
from outcome import Case, Outcome
from subjects import build_kernels, command, example, model_and_text, plan_of_layers, save_in_turns, use_kernels

from rana_compile import Plan, PlanError


def saved_pair(directory: Path) -> tuple[tuple[Path, Path], set[str]]:
    """Two plans in files, and their digests."""
    paths = directory / "first", directory / "second"
    plans = [plan_of_layers(budget) for budget in (0.5, 0.9)]
    for path, plan in zip(paths, plans, strict=True):
        plan.save(path)
    return paths, {plan.digest() for plan in plans}


def is_whole(path: Path, digests: set[str]) -> bool:
    try:
        return Plan.load(path).digest() in digests
    except PlanError:
        return False


def kill_while_saving(tries: int, directory: Path) -> Outcome:
    """A child saves two plans in turns over one file."""
    pair, digests = saved_pair(directory)
    folder = directory / "target"
    path, lost = folder / "plan", 0
    Plan.load(pair[0]).save(path)
    for moment in moments(tries, 1.0):
        killed_after(0.3 + moment, save_in_turns, path, *pair)
        lost += not is_whole(path, digests)
        Plan.load(pair[0]).save(path)
        lost += bool(temporaries(folder))
    return Outcome("kill -9 while a plan is saved", tries, lost, "the old plan or the new one; no leftovers")


def save_at_once(tries: int, directory: Path) -> Outcome:
    """Two children save over one file, again and again, while it is read."""
    pair, digests = saved_pair(directory)
    folder = directory / "target"
    path, lost = folder / "plan", 0
    Plan.load(pair[0]).save(path)
    children = [started(save_in_turns, path, *pair) for _ in range(2)]
    for _ in range(10 * tries):
        lost += not is_whole(path, digests)
        time.sleep(0.02)
    for child in children:
        lost += not kill(child)  # one that failed is no longer there
    Plan.load(pair[0]).save(path)
    lost += bool(temporaries(folder))
    return Outcome("two processes save one plan at once", 10 * tries, lost, "each read gives one of the two, whole")


def kill_while_calibrating(tries: int, directory: Path) -> Outcome:
    """``rana-compile calibrate``, killed, and run again."""
    model, text = model_and_text(directory)
    size = ("--length", "32", "--tokens", "640", "--recipe", "neuron", "--save-every", "0", "--quiet")
    log, folder = directory / "log", directory / "target"
    begun, path, recording = directory / "begun", folder / "plan", folder / "plan.recording"

    def arguments(out: Path) -> tuple[str, ...]:
        return "calibrate", str(model), "--text", str(text), *size, "-o", str(out)

    whole = directory / "whole"
    seconds = finished(command, log, begun, *arguments(whole))
    lost, resumed = 0, 0
    for moment in moments(tries, seconds):
        killed_after(moment, command, log, begun, *arguments(path))
        resumed += recording.exists()
        lost += path.exists() and path.read_bytes() != whole.read_bytes()
        ended = succeeds(command, log, begun, *arguments(path))
        lost += not ended or path.read_bytes() != whole.read_bytes() or [p.name for p in folder.iterdir()] != ["plan"]
        path.unlink(missing_ok=True)
    seen = f"run again, the same bytes; {resumed} went on from a recording"
    return Outcome("kill -9 during `rana-compile calibrate`", tries, lost, seen)


def kill_while_building(tries: int, directory: Path) -> Outcome:
    """The compiler and what calls it; the next build meets what the last one left."""
    library, tries = directory / "cache" / "cpu.so", max(2, tries // 4)
    seconds = finished(build_kernels, library)
    lost = 0
    for moment in moments(tries, seconds):
        library.unlink(missing_ok=True)
        killed_after(moment, build_kernels, library)
        lost += library.exists() and not succeeds(use_kernels, library)
    ended = succeeds(build_kernels, library) and succeeds(use_kernels, library)
    lost += not ended or bool(temporaries(library.parent))
    return Outcome(
        "kill -9 while kernels are built", tries, lost, "no library or a whole one; the next build clears up"
    )


def build_at_once(tries: int, directory: Path) -> Outcome:
    """Two children build one library."""
    library, tries, lost = directory / "cache" / "cpu.so", max(1, tries // 10), 0
    for _ in range(tries):
        library.unlink(missing_ok=True)
        children = [started(build_kernels, library) for _ in range(2)]
        for child in children:
            child.join()
        lost += any(child.exitcode for child in children) or not succeeds(use_kernels, library)
        lost += bool(temporaries(library.parent))
    return Outcome("two processes build kernels at once", tries, lost, "both end well, the library works")


def last_loss(log: Path) -> float:
    """Of the last step that a run printed."""
    return float(re.findall(r"step \d+ loss ([\d.]+)", log.read_text(encoding="utf-8"))[-1])


def kill_while_training(tries: int, directory: Path) -> Outcome:
    """``examples/train_loop.py``, killed and run again: calibration, saves of the plan and of the run's state."""
    log, size = directory / "log", ("--steps", "12", "--save-steps", "1", "--out")
    seconds = finished(example, log, "train_loop.py", *size, str(directory / "whole"))
    expected, lost, resumed = last_loss(log), 0, 0
    for i, moment in enumerate(moments(tries, seconds)):
        out = directory / str(i)
        killed_after(moment, example, log, "train_loop.py", *size, str(out))
        resumed += (out / "state.safetensors").exists()
        again = directory / f"log-{i}"
        ended = succeeds(example, again, "train_loop.py", *size, str(out))
        done = again.exists() and "step" not in again.read_text(encoding="utf-8")  # it was killed after its last step
        lost += not ended or not (done or abs(last_loss(again) - expected) < 1e-4) or bool(temporaries(out))
    seen = f"run again, the same loss at the end; {resumed} went on from a save"
    return Outcome("kill -9 during `examples/train_loop.py`", tries, lost, seen)


def kill_while_recovering(tries: int, directory: Path) -> Outcome:
    """``examples/recover.py``: it calibrates, trains, refits thresholds and saves on a schedule."""
    model, text = model_and_text(directory)
    log, tries = directory / "log", max(2, tries // 2)
    given = {"model": model, "text": text, "eval": text, "length": 64, "eval-windows": 4, "minutes": 5, "steps": 20}
    given |= {"save-minutes": 0, "refit-minutes": 0.02, "calibration-tokens": 1024, "refit-tokens": 512}
    arguments = [f"--{key}={value}" for key, value in given.items()] + ["--quiet"]
    seconds = finished(example, log, "recover.py", *arguments, f"--out={directory / 'whole'}")
    lost, resumed = 0, 0
    for i, moment in enumerate(moments(tries, seconds)):
        out = directory / str(i)
        killed_after(moment, example, log, "recover.py", *arguments, f"--out={out}")
        resumed += (out / "training.safetensors").exists()
        ended = succeeds(example, log, "recover.py", *arguments, f"--out={out}")
        lost += not ended or not (out / "results.json").exists() or bool(temporaries(out))
        lost += ended and not Plan.load(out).adapted
    seen = f"run again, it ends as it should; {resumed} went on from a save"
    return Outcome("kill -9 during `examples/recover.py`", tries, lost, seen)


CASES: tuple[Case, ...] = (
    kill_while_saving,
    save_at_once,
    kill_while_calibrating,
    kill_while_building,
    build_at_once,
    kill_while_training,
    kill_while_recovering,
)
