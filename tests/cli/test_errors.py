"""Wrong input: the exit status says so, one line says what, and there is no traceback."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import run_cli

ROOT = Path(__file__).parents[2]
COMMANDS = ("calibrate", "show", "eval", "bench", "explain", "sweep", "doctor")


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in COMMANDS), ["--version"]])
def test_help_of_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(*arguments) == 0
    assert "rana-compile" in capsys.readouterr().out


def test_the_parser_is_made_without_torch() -> None:
    code = "import sys; from rana_compile.cli.arguments import parser; parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["calibrate", "{none}", "--text", "{none}", "-o", "{out}"], "cannot read the text"),  # before any model
        (["calibrate", "{none}", "--text", "{text}", "-o", "{out}"], "not a directory, hub name or GGUF file"),
        (["calibrate", "{text}", "--text", "{text}", "-o", "{out}"], "is a file, but no GGUF file"),
        (["calibrate", "{empty}", "--text", "{text}", "-o", "{out}"], "no config.json and 0 GGUF files"),
        (["calibrate", "{model}", "--text", "{text}", "--length", "99999", "-o", "{out}"], "fewer than 99999 tokens"),
        (["calibrate", "{model}", "--text", "{text}", "--flops-budget", "1.5", "-o", "{out}"], "a share in (0, 1]"),
        (["calibrate", "{model}", "--text", "{text}", "--length", "32", "--exclude", "typo", "-o", "{out}"], "typo"),
        (
            ["calibrate", "{bare}", "--text", "{text}", "-o", "{out}"],
            "'{bare}' holds a model, but no tokenizer that can be read; put one beside it",
        ),
        (["show", "{none}"], "no plan at"),
        (["show", "{text}"], "not a readable plan"),
        (["show", "{plan}", "--model", "{model}"], "give --html FILE too"),
        (["show", "{plan}", "--html", "{out}", "--text", "{text}"], "need both --model and --text"),
        (["show", "{plan}", "--html", "{out}", "--points", "{text}"], "no points"),
        (["eval", "{model}", "{none}", "--text", "{text}"], "no plan at"),
        (["explain", "{model}", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["sweep", "{model}", "--text", "{text}", "--budgets", "0", "-o", "{out}"], "a share in (0, 1]"),
    ],
)
def test_bad_input_is_status_two_and_one_line(
    arguments: list[str], words: str, model_directory: Path, text: Path, plan: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    shutil.copytree(model_directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    places = {"model": model_directory, "text": text, "plan": plan, "none": tmp_path / "none"}
    places |= {"empty": tmp_path / "empty", "bare": tmp_path / "bare", "out": tmp_path / "out"}
    capsys.readouterr()
    assert run_cli(*(a.format(**places) for a in arguments), "--json") == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["status"] == 2 and words.format(**places) in document["error"]
    assert document["error"].count(words.format(**places)[:12]) == 1  # not inside another error
    assert "Traceback" not in captured.err and "rana-compile: " in captured.err


def test_usage_is_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli() == run_cli("calibrat") == run_cli("calibrate", "m", "--text", "t", "-o", "o", "--tokens", "0") == 2
    assert "0 is not a positive number" in capsys.readouterr().err


def test_failures_and_interrupts_have_their_own_status(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(error: BaseException) -> None:
        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr("rana_compile.plan.Plan.load", fails)

    stand_in(OSError("disk on fire"))
    assert run_cli("show", plan) == 3
    assert "OSError: disk on fire (--debug shows where)" in capsys.readouterr().err
    with pytest.raises(OSError, match="disk on fire"):
        run_cli("show", plan, "--debug")
    stand_in(KeyboardInterrupt())
    assert run_cli("show", plan) == 130


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "m", "--text", "{text}", "-o", "/proc/none/plan"],
        ["sweep", "m", "--text", "{text}", "-o", "/proc/none"],
        ["show", "{plan}", "--html", "/proc/none/page.html", "--model", "m", "--text", "{text}"],
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_a_model_is_read(
    arguments: list[str], text: Path, plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"rana_compile.cli.{arguments[0]}.load", None)
    capsys.readouterr()
    assert run_cli(*(a.format(text=text, plan=plan) for a in arguments)) == 3
    err = capsys.readouterr().err
    assert "rana-compile: cannot write '/proc/none" in err and "choose a place that can be written" in err


@pytest.mark.parametrize(
    "raised", [MemoryError("of the machine"), RuntimeError("CUDA out of memory. Tried to allocate")]
)
def test_out_of_memory_names_the_options_that_need_less(
    raised: Exception, plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rana_compile.memory import naming_remedy

    def fails(*_: object) -> None:
        with naming_remedy("shorter batches need less"):
            raise raised

    monkeypatch.setattr("rana_compile.plan.Plan.load", fails)
    assert run_cli("show", plan) == 3
    err = capsys.readouterr().err
    assert "shorter batches need less" in err and "fewer --tokens, a shorter --length, --dtype bfloat16" in err


def test_an_interrupt_that_ends_in_another_error_is_still_one(
    plan: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where it falls into an import of a module in C."""

    def fails(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr("rana_compile.plan.Plan.load", fails)
    capsys.readouterr()
    assert run_cli("show", plan, "--json") == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": "interrupted", "status": 130}
    assert captured.err == "rana-compile: interrupted\n"


AT_IMPORT = """
import signal, sys
from rana_compile.cli import main

class Finder:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.exit(main(["show", "plan"]))
"""


@pytest.mark.parametrize("module", ["rana_compile.cli.screen", "rana_compile.cli.show", "torch", "numpy"])
def test_ctrl_c_while_it_starts_is_status_130_and_one_line(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", AT_IMPORT, module], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "rana-compile: interrupted\n")


SWALLOWED = """
import contextlib, signal, sys
from rana_compile.cli import main
from rana_compile.progress import Progress

def say(bar, stage, said=Progress.say):
    said(bar, stage)
    if stage.startswith(sys.argv[1]):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

Progress.say = say
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("stage", ["recording", "measuring"])
def test_ctrl_c_that_something_swallows_is_raised_at_the_next_step(
    stage: str, model_directory: Path, text: Path, tmp_path: Path
) -> None:
    command = ["calibrate", str(model_directory), "--text", str(text), "--length", "32", "--tokens", "640"]
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, stage, *command, "--quiet", "-o", str(tmp_path / "plan")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "rana-compile: interrupted\n")
    assert not (tmp_path / "plan").exists()


def test_ctrl_c_while_it_records_is_status_130_and_one_line(model_directory: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rana_compile.cli", "calibrate", str(model_directory), "--text", str(text)]
    size = ["--length", "32", "--tokens", "5600", "--save-every", "0", "--quiet", "-o", str(tmp_path / "plan")]
    with subprocess.Popen([*command, *size], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "plan.recording").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read() == "rana-compile: interrupted\n"
    assert process.returncode == 130
    assert [p.name for p in tmp_path.iterdir()] == ["plan.recording"]


def test_a_killed_calibration_goes_on(
    model_directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed for good once the recording lies beside the plan; run again it gives an undisturbed run's bytes."""
    tokens = ("--length", "32", "--tokens", "640", "--recipe", "neuron", "--save-every", "0")
    arguments = ("calibrate", str(model_directory), "--text", str(text), *tokens, "-o")
    out, whole, recording = tmp_path / "plan", tmp_path / "whole", tmp_path / "plan.recording"
    command = [sys.executable, "-m", "rana_compile.cli", *arguments, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not recording.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert run_cli(*arguments, whole) == 0
    assert run_cli(*arguments, out) == 0
    assert "going on from" in capsys.readouterr().err and not recording.exists()
    assert out.read_bytes() == whole.read_bytes()
