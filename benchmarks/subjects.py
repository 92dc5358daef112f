"""What faults happen to: tiny models, plans and commands, as functions that a child can run."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from kills import silenced
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))  # for tiny_models; last, since both folders have an inputs.py and ours is this one
PROSE = "the quick brown fox jumps over a lazy dog, and then {} times it sleeps in the sun by the river. "
VOCABULARY = 128
WIDTH = 512


def llama(layers: int = 1) -> Any:
    from tiny_models import build

    return build("Llama", layers)[0].requires_grad_(True)


def tokens(batches: int, length: int = 32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for _ in range(batches)]


def plan_of_layers(budget: float) -> Plan:
    """A plan of two megabytes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4 * WIDTH))
    batches = [{"input": torch.randn(64, WIDTH)} for _ in range(4)]
    return rana_compile.calibrate(model, batches, budget, progress=False)


def save_in_turns(path: Path, first: Path, second: Path) -> None:
    """Until it is killed, or who started it is gone."""
    plans, parent = [Plan.load(first), Plan.load(second)], os.getppid()
    while os.getppid() == parent:
        for plan in plans:
            plan.save(path)


def model_and_text(directory: Path) -> tuple[Path, Path]:
    """A model's directory and a text, as the command takes them."""
    from tiny_models import byte_tokenizer

    llama().save_pretrained(directory / "model")
    byte_tokenizer().save_pretrained(directory / "model")
    text = directory / "text.txt"
    text.write_text("".join(PROSE.format(i) for i in range(200)), encoding="utf-8")
    return directory / "model", text


def command(log: Path, started: Path, *arguments: str) -> None:
    """``rana-compile``; the file ``started`` is there when it begins."""
    from rana_compile.cli import main

    silenced(log)
    started.touch()
    sys.exit(main(arguments))


def example(log: Path, name: str, *arguments: str) -> None:
    """A script of examples/, without Inductor, whose minutes have nothing to do with its files."""
    from torch._inductor import compile_fx

    silenced(log)
    sys.path.insert(0, str(EXAMPLES))  # a script finds what lies beside it first, as if it were run by hand
    compile_fx.compile_fx = lambda gm, inputs, **_: gm
    sys.argv = [name, *arguments]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def build_kernels(library: Path) -> None:
    from rana_compile.kernels import cpu

    compiler = cpu.find_compiler()
    assert compiler is not None
    cpu.build(compiler, library)


def use_kernels(library: Path) -> None:
    from rana_compile.kernels import ops  # the ops' schemas, which the library implements

    torch.ops.load_library(library)
    assert "linear" in ops.NAMES
    assert torch.ops.rana.linear(torch.ones(1, 8), torch.ones(6, 8), None).sum() == 48
