"""The same seed gives the same plan in any process, the same input the same output with any number of threads."""

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import endurance
import pytest
import torch
from support import plan_of, tiny_llama, tokens
from torch import nn
from torch._dynamo.convert_frame import compile_lock

import rana_compile
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.types import Site

CALIBRATION = """
import torch
from torch import nn
import rana_compile

torch.manual_seed(0)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
    def forward(self, x):
        x = x + self.q(x) * self.k(x).sigmoid()
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))
batches = [{"x": torch.randn(1, 40, 32)} for _ in range(6)]
rana_compile.calibrate(Block(), batches, flops_budget=0.6, seed=3, progress=False).save("plan.safetensors")
"""


def test_processes_make_the_same_plan(tmp_path: Path) -> None:
    """Whatever order their sets and hashes have, and however many threads."""
    found = []
    for seed, threads in (("1", "1"), ("2", "2")):
        place = tmp_path / seed
        place.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", CALIBRATION]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(hashlib.sha256((place / "plan.safetensors").read_bytes()).hexdigest())
    assert found[0] == found[1]


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_same_bits_with_any_number_of_threads(
    thread_counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Sites so large that threads divide them, and not evenly."""
    d, h = 515, 1030
    model = nn.Sequential(nn.Linear(d, h), nn.Linear(h, d), nn.Linear(d, d)).to(dtype).requires_grad_(False)
    basis = torch.linalg.svd(model[2].weight.float())[0][:, :333].contiguous()
    plan = plan_of(
        model,
        (Site("0", "linear", ("0.weight",), d, (h,)), "neuron", neuron_tensors(torch.rand(1, d))),
        (Site("1", "linear", ("1.weight",), h, (d,)), "neuron", neuron_tensors(torch.rand(1, h) / 9)),
        (
            Site("2", "linear", ("2.weight",), d, (d,)),
            "rank",
            {"output_basis": basis, "threshold": torch.rand(333) / 99},
        ),
    )
    model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
    x = torch.randn(1, d).to(dtype)
    outputs = []
    for count in thread_counts:
        torch.set_num_threads(count)
        outputs.append(model(x))
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert outputs[0].isfinite().all() and outputs[0].any()


def test_plans_do_not_mix_in_one_process() -> None:
    """Two models of a class, two plans of a model, called in turns and at once."""
    torch.manual_seed(0)
    models = [tiny_llama(layers=1), tiny_llama(layers=1)]
    plans = [
        rana_compile.calibrate(model, tokens(4), flops_budget=budget, recipe="neuron", progress=False)
        for model, budget in ((models[0], 0.5), (models[1], 0.5), (models[0], 0.8))
    ]
    cases = [(models[0], plans[0]), (models[1], plans[1]), (models[0], plans[2])]
    inputs = [ids[:, :length] for ids in tokens(2, seed=9) for length in (1, 6)]
    alone = []
    for model, plan in cases:
        with rana_compile.adapted(model, plan) as run:
            alone.append([run(input_ids=ids, use_cache=False).logits for ids in inputs])
    fast = [endurance.compiled(copy.deepcopy(model), plan, "eager") for model, plan in cases]

    def outputs(i: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [fast[i](input_ids=ids, use_cache=False).logits for ids in inputs]

    in_turns = [outputs(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(outputs, range(3)))
    for expected, one, other in zip(alone, in_turns, at_once, strict=True):
        for a, b, c in zip(expected, one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
            assert torch.equal(b, c)
    assert not torch.allclose(alone[0][1], alone[2][1], atol=1e-2)


def test_a_compilation_outside_of_dynamo_waits_for_its_lock() -> None:
    """Another thread may be tracing, with the same fake tensors: with both at once the first one fails."""
    model = endurance.tiny_model()
    plan, ids = endurance.planned(model), endurance.batches(1)[0][:, :1]
    other = endurance.compiled(copy.deepcopy(model), plan, "eager")
    first = endurance.compiled(model, plan, "eager")

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    expected = run(first)
    with ThreadPoolExecutor(1) as pool:
        with compile_lock:
            waiting = pool.submit(run, other)  # finds the graph, and has it compiled for its own weights
            assert not wait([waiting], timeout=1).done
        assert torch.equal(waiting.result(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_plan_serves_two_devices() -> None:
    torch.manual_seed(0)
    model = tiny_llama(layers=1).requires_grad_(False)
    plan = rana_compile.calibrate(model, tokens(4), flops_budget=0.6, recipe="neuron", progress=False)
    ids = tokens(1, seed=9)[0][:, :1]
    fast = {device: endurance.compiled(copy.deepcopy(model).to(device), plan, "eager") for device in ("cpu", "cuda")}
    for _ in range(2):
        here, there = (fast[d](input_ids=ids.to(d), use_cache=False).logits.cpu() for d in ("cpu", "cuda"))
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
