"""Ctrl-C, full disks and too little memory: the model stays usable, files whole, and the error says what to do."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from kills import finished, moments, started, succeeds, temporaries
from outcome import Case, Outcome
from subjects import command, llama, model_and_text, plan_of_layers, tokens
from torch import Tensor

import rana_compile
from rana_compile import OutOfMemoryError, Plan, RanaError, WriteError

GROWTH = 3 << 26  # bytes: somewhat more than the calibration takes


def interrupted_after(seconds: float, work: Callable[[], Any]) -> bool:
    """Whether a KeyboardInterrupt came before the work was done."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGALRM, before)
    return False


def state_of(model: Any) -> tuple[Any, ...]:
    """All that calibration changes for a while."""
    modules = [(m.training, m._compiled_call_impl is None, len(m._forward_hooks)) for m in model.modules()]
    return modules, [(p.requires_grad, p.grad is None) for p in model.parameters()], torch.is_grad_enabled()


def calibrated(model: Any, batches: list[Tensor], checkpoint: Path | None = None) -> Plan:
    return rana_compile.calibrate(model, batches, 0.6, "neuron", progress=False, checkpoint=checkpoint)


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def interrupt_calibration(tries: int, directory: Path) -> Outcome:
    model, batches = llama().train(), tokens(6)
    before, dense = state_of(model), model(input_ids=batches[0]).logits

    calibrate = partial(calibrated, model, batches)
    expected = calibrate().digest()
    lost, came = 0, 0
    for moment in moments(tries, timed(calibrate)):
        came += interrupted_after(moment, calibrate)
        lost += state_of(model) != before or not torch.equal(model(input_ids=batches[0]).logits, dense)
    lost += calibrate().digest() != expected
    seen = f"{came} came in time; flags, hooks and outputs as before, the next plan the same"
    return Outcome("Ctrl-C during `calibrate`", tries, lost, seen)


def interrupt_backend(tries: int, directory: Path) -> Outcome:
    """Without a plan: while the first calls run, the backend fits itself, and its graphs are swapped."""
    dense_model, prompts = llama(), tokens(12)
    with torch.no_grad():
        dense = [dense_model(input_ids=ids, use_cache=False).logits for ids in prompts]
    seconds = timed(lambda: used(compiled(), prompts))
    lost, came = 0, 0
    for moment in moments(tries, seconds):
        model = compiled()
        before = state_of(model)
        came += interrupted_after(moment, partial(used, model, prompts))
        lost += state_of(model) != before or not is_usable(model, prompts, dense)
    seen = f"{came} came in time; dense until a whole fit, adapted after it"
    return Outcome("Ctrl-C while the backend calibrates itself", tries, lost, seen)


def compiled() -> Any:
    torch._dynamo.reset()
    model = llama()
    options = {"calibration_tokens": 128, "max_divergence": 9.0, "recipe": "neuron", "compiler": "eager"}
    model.compile(backend="rana", options=options)
    return model


def used(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits for ids in prompts]


def is_usable(model: Any, prompts: list[Tensor], dense: list[Tensor]) -> bool:
    """Whether a call gives the dense model's output, or that of the plan that it says it has; in the end of a plan."""
    for _ in range(2):
        try:
            plan = rana_compile.plan_of(model)
        except RanaError:
            if not torch.allclose(used(model, prompts[:1])[0], dense[0], atol=1e-4):
                return False
            used(model, prompts)
            continue
        with torch.no_grad(), rana_compile.adapted(model, plan) as run:
            expected = run(input_ids=prompts[0], use_cache=False).logits
        return torch.allclose(used(model, prompts[:1])[0], expected, atol=1e-3)
    return False


def interrupt_command(tries: int, directory: Path) -> Outcome:
    """SIGINT to ``rana-compile calibrate``, from its first line on."""
    model, text = model_and_text(directory)
    log, begun, out = directory / "log", directory / "begun", directory / "target" / "plan"
    size = ("--length", "32", "--tokens", "640", "--recipe", "neuron", "--save-every", "0", "--quiet")
    arguments = ("calibrate", str(model), "--text", str(text), *size, "-o", str(out))
    seconds = finished(command, log, begun, *arguments)
    whole, lost, came = out.read_bytes(), 0, 0
    for moment in moments(tries, 0.9 * seconds):
        for path in (log, begun, out):
            path.unlink(missing_ok=True)
        child = started(command, log, begun, *arguments)
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(moment)
        assert child.pid is not None
        if child.is_alive():
            os.kill(child.pid, signal.SIGINT)
        child.join()
        came += child.exitcode == 130
        said = log.read_text(encoding="utf-8")
        lost += (child.exitcode, said) not in ((130, "rana-compile: interrupted\n"), (0, said))
    lost += not came or not succeeds(command, log, begun, *arguments) or out.read_bytes() != whole
    return Outcome("Ctrl-C in a shell", tries, lost, f"{came} with status 130 and one line; run again, the same bytes")


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """A directory that holds so many bytes: a file system of its own, or, without the right to mount one, a limit."""
    place = directory / "disk"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield place
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(tries: int, directory: Path) -> Outcome:
    """A plan, a recording and a page, on disks that hold some of it."""
    model, batches, plan = llama(), tokens(4), plan_of_layers(0.5)
    expected = calibrated(model, batches).digest()
    plan.save(directory / "sized")
    need = (directory / "sized").stat().st_size
    lost, refused = 0, 0
    for room in moments(tries, 1.5 * need, seed=1):
        with small_disk(directory, 4096 + int(room)) as disk:
            old = disk / "old"
            old.write_text("old")
            refused += (failed := is_refused(partial(plan.save, old)))
            lost += old.read_bytes() != (b"old" if failed else (directory / "sized").read_bytes())
            again = partial(calibrated, model, batches, disk / "recording")
            if not is_refused(again):
                lost += again().digest() != expected
            lost += bool(temporaries(disk))
    seen = f"{refused} refused, with what to do; the old file whole, no leftovers"
    return Outcome("the disk is full, for a plan or a recording", tries, lost, seen)


def is_refused(work: Callable[[], object]) -> bool:
    try:
        work()
    except WriteError as error:
        assert "untouched" in str(error) and "Free space" in str(error)
        return True
    return False


def out_of_memory(tries: int, directory: Path) -> Outcome:
    """A process that may take so many bytes more calibrates, which needs a sixth of a gigabyte."""
    lost, met = 0, 0
    for i, growth in enumerate(moments(tries, GROWTH)):
        note = directory / str(i)
        child = started(calibrate_within, int(growth), note)
        child.join()
        said = note.read_text(encoding="utf-8") if note.exists() else ""
        met += said == "refused"
        lost += child.exitcode != 0 or said not in ("refused", "done")
    return Outcome("too little memory for a calibration", tries, lost, f"{met} refused, each names what needs less")


def calibrate_within(growth: int, note: Path) -> None:
    torch.set_num_threads(1)
    model, batches = llama(), [ids.repeat(64, 1) for ids in tokens(4, length=256)]
    calibrated(model, tokens(4))  # all that is imported late is
    before = state_of(model)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + growth, hard))
    try:
        calibrated(model, batches)
        said = "done"
    except OutOfMemoryError as error:
        said = "refused" if "need less" in str(error) and error.__cause__ is not None else str(error)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert state_of(model) == before
    note.write_text(said, encoding="utf-8")


CASES: tuple[Case, ...] = (interrupt_calibration, interrupt_backend, interrupt_command, full_disk, out_of_memory)
