"""The training examples, run as a user runs them: to the end, killed and resumed, in two processes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
SIZE = ("--steps", "12", "--save-steps", "4")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def killed(process: "subprocess.Popen[str]", sign: str) -> str:
    """The output up to a line with ``sign``, at which the process and its children got SIGKILL."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if sign in line:
            break
    assert sign in seen, seen[-3000:]
    for member in (*psutil.Process(process.pid).children(recursive=True), process):  # torchrun's first
        member.kill()
    process.wait()
    process.stdout.close()
    return seen


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+) loss ([\d.]+)", output)}


@pytest.mark.parametrize("name", ["loop", "ddp"])
def test_a_killed_run_ends_as_the_one_that_was_not(name: str, tmp_path: Path) -> None:
    launcher = TWO if name == "ddp" else ()
    script = (*launcher, str(ROOT / "examples" / f"train_{name}.py"), *SIZE, "--out")
    whole = finished(start(*script, str(tmp_path / "whole")))
    killed(start(*script, str(tmp_path / "killed")), "step 10 loss")
    rest = finished(start(*script, str(tmp_path / "killed")))
    assert set(losses(rest)) == {9, 10, 11, 12}
    assert losses(rest)[12] == pytest.approx(losses(whole)[12], abs=1e-4)
    if name == "ddp":
        for output in (whole, rest):
            for what in (r"plan ([0-9a-f]{64})", r"weights (-?\d+\.\d{9})"):  # the ranks' lines may touch
                first, second = re.findall(rf"rank \d {what}", output)
                assert first == second


def test_trainer_resumes_saves_and_loads(tmp_path: Path) -> None:
    script = (str(ROOT / "examples" / "train_trainer.py"), *SIZE, "--out")
    whole = finished(start(*script, str(tmp_path / "whole")))
    killed(start(*script, str(tmp_path / "killed")), "'epoch': '0.1406'")  # a step after the second save
    assert (tmp_path / "killed" / "checkpoint-8").is_dir()
    rest = finished(start(*script, str(tmp_path / "killed")))
    assert losses(rest)[12] == pytest.approx(losses(whole)[12], abs=1e-3)
    assert {p.name for p in (tmp_path / "killed" / "final").iterdir()} >= {"config.json", "model.safetensors"}


FSDP = """
import torch, torch.distributed as dist, rana_compile
from support import tiny_llama, tokens
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)
model = tiny_llama()
mine = tokens(8, 64, seed=dist.get_rank())
plan = rana_compile.calibrate(model, mine, flops_budget=0.6, progress=False, group=dist.group.WORLD)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
try:
    rana_compile.calibrate(model, mine, progress=False)
except rana_compile.ConfigError as error:
    print("error", error, flush=True)
ids = tokens(1)[0]
model.compile(backend="rana", options={"plan": plan, "compiler": "aot_eager"})
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for step in range(8):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:  # lines of two processes may mix
        print("step", step, "loss", loss.item(), flush=True)
dist.destroy_process_group()
"""


def test_sharded_models_train_and_calibrating_one_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(FSDP, encoding="utf-8")
    output = finished(start(*TWO, str(tmp_path / "sharded.py")))
    assert "calibrate before fully_shard" in output
    assert losses(output)[7] < losses(output)[0] - 0.1


UNEQUAL = """
import torch.distributed as dist, rana_compile
from support import tiny_llama, tokens

dist.init_process_group("gloo")
try:
    rana_compile.calibrate(tiny_llama(), tokens(4 + dist.get_rank()), progress=False, group=dist.group.WORLD)
except rana_compile.ConfigError as error:
    print("error", error, flush=True)
"""


def test_unequal_data_is_an_error_on_every_process(tmp_path: Path) -> None:
    (tmp_path / "unequal.py").write_text(UNEQUAL, encoding="utf-8")
    output = finished(start(*TWO, str(tmp_path / "unequal.py")))
    assert output.count("sizes of the batches differ between processes") == 2


def test_recovery_runs_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    from support import tiny_llama
    from tiny_models import byte_tokenizer

    tiny_llama(layers=1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; every unhappy family is unhappy in its own way. " * 200)
    given = {"model": tmp_path / "model", "text": text, "out": tmp_path / "out", "length": 64, "eval-windows": 4}
    given |= {"minutes": 5, "steps": 30, "save-minutes": 0, "refit-minutes": 0.02, "eval": text}
    script = [str(ROOT / "examples" / "recover.py"), *(f"--{key}={value}" for key, value in given.items())]
    process = start(*script)
    state = tmp_path / "out" / "training.safetensors"
    while not state.exists() and process.poll() is None:
        pass
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert state.exists()
    output = finished(start(*script))
    assert "of the lost perplexity came back" in output and "30 steps" in output
    assert (tmp_path / "out" / "rana_plan.safetensors").exists()
