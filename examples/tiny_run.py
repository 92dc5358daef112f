"""What the training examples share: a tiny Llama, text of Python's documentation in single characters, a plan."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from inputs import pydoc_topics
from tiny_models import build, byte_tokenizer
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("run"), help="plan and state; a run that finds them goes on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step, of each process")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def tiny_model() -> nn.Module:
    """As ``from_pretrained`` gives a model, in evaluation mode; here with random weights."""
    return build("Llama")[0].requires_grad_(True)


def text(length: int = 64, windows: int = 256) -> Tensor:
    """Windows [windows, length] of token ids."""
    return pydoc_topics(byte_tokenizer(), length, windows, 1)[0]


def drawn(windows: Tensor, batch: int, step: int) -> Tensor:
    """The windows [batch, length] of a step, the same ones when a run is resumed there."""
    generator = torch.Generator().manual_seed(step)
    return windows[torch.randint(len(windows), (batch,), generator=generator)]


def plan_of_run(model: nn.Module, batches: Iterable[Tensor], path: Path, group: Any = None, write: bool = True) -> Plan:
    """The run's plan: fitted to the weights that it starts from, and read when it is resumed."""
    if not path.exists():
        plan = rana_compile.calibrate(model, batches, flops_budget=0.6, progress=False, group=group)
        if write:
            plan.save(path)
        return plan
    return Plan.load(path)
