"""Whatever says that memory is lacking, the error says what needs less, and the model is as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens

import rana_compile
from rana_compile import OutOfMemoryError, RanaError
from rana_compile.memory import is_out_of_memory, naming_remedy

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4611686018427387904 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(CPU),
    torch._dynamo.exc.InternalTorchDynamoError("MemoryError: std::bad_alloc\n"),
]


def failing(error: Exception) -> Callable[..., Any]:
    def fails(*_: object) -> None:
        raise error

    return fails


def test_the_allocator_itself() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.float32)
    assert is_out_of_memory(found.value)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_each_kind_names_the_remedy_and_its_origin(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match=r"out of memory \(.+\); eat less") as found, naming_remedy("eat less"):
        raise error
    assert found.value.__cause__ is error
    assert isinstance(found.value, RanaError) and isinstance(found.value, MemoryError)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shape"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, naming_remedy("eat less"):
        raise error
    assert found.value is error


def test_an_error_that_names_a_remedy_keeps_it() -> None:
    with pytest.raises(OutOfMemoryError, match="inner"), naming_remedy("outer"), naming_remedy("inner"):
        raise MemoryError


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_calibration_says_what_needs_less_and_leaves_the_model(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=1).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    monkeypatch.setattr("rana_compile.calibration.differentiate", failing(error))
    with pytest.raises(OutOfMemoryError, match="batches of fewer tokens need less") as found:
        rana_compile.calibrate(model, tokens(4), progress=False)
    assert found.value.__cause__ is error
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_compiled_model_without_room_for_its_layouts_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids,) = tiny_llama(layers=1), tokens(1, length=1)
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    with torch.no_grad(), rana_compile.adapted(model, plan) as run:
        expected = run(input_ids=ids).logits
    model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
    with monkeypatch.context() as patch, torch.no_grad():
        lacking = failing(torch.OutOfMemoryError("CUDA out of memory"))
        patch.setattr("rana_compile.adapters.neuron.Neuron.pack", lacking)
        with pytest.raises(Exception, match=r"laid out beside the model's own: leave some of them dense"):
            model(input_ids=ids)
    with torch.no_grad():  # there is room again
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
