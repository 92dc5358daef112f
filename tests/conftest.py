"""What every test runs under: no network, the same random numbers, no compiled graph left by another test."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of compilers costs more than tests' graphs
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores; read when torch is imported

import hypothesis
import torch
from torch import nn

if TYPE_CHECKING:
    from rana_compile import Plan

# The same examples in every run, and no judgement of their time: a test that fails must fail for what was changed.
hypothesis.settings.register_profile("rana", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("rana")


def pytest_configure() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell would ignore it
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A language model of one layer, for tests that need any; ``plan`` is for it."""
    from support import tiny_llama

    torch.manual_seed(0)
    return tiny_llama(layers=1)


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> "Plan":
    from support import tokens

    import rana_compile

    return rana_compile.calibrate(model, tokens(4), flops_budget=0.6, recipe="neuron", progress=False)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Graphs of one test must not count towards another's recompile limit, nor answer for it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
