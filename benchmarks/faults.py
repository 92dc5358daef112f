"""Faults: a process is killed at any moment of what it does; what was there stays whole, the next run goes on."""

from pathlib import Path

import torch
from kills import killed_after, moments
from outcome import Case, Outcome
from torch import nn

import rana_compile
from rana_compile import Plan

WIDTH = 512


def kill_while_saving(tries: int, directory: Path) -> Outcome:
    """A child saves two plans in turns over one file."""
    path, plans = directory / "plan.safetensors", [plan_of_layer(budget) for budget in (0.5, 0.9)]
    for i, plan in enumerate(plans):
        plan.save(directory / f"{i}.safetensors")
    plans[0].save(path)
    whole, lost = {plan.digest() for plan in plans}, 0
    for moment in moments(tries, 1.0):
        killed_after(0.3 + moment, save_in_turns, path, directory)
        lost += Plan.load(path).digest() not in whole
    plans[0].save(path)
    left = sorted(p.name for p in directory.iterdir())
    lost += left != ["0.safetensors", "1.safetensors", "plan.safetensors"]
    return Outcome("kill -9 while a plan is saved over another", tries, lost, "the file is the old plan or the new one")


def save_in_turns(path: Path, directory: Path) -> None:
    plans = [Plan.load(directory / f"{i}.safetensors") for i in range(2)]
    while True:
        for plan in plans:
            plan.save(path)


def plan_of_layer(budget: float) -> Plan:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4 * WIDTH))
    batches = [{"input": torch.randn(64, WIDTH)} for _ in range(4)]
    return rana_compile.calibrate(model, batches, budget, progress=False)


CASES: tuple[Case, ...] = (kill_while_saving,)
