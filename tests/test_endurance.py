"""The cases of benchmarks/endurance.py, short: long runs, threads and forks lose nothing, and what is lost is seen."""

import gc
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import endurance
import pytest
import torch

import rana_compile


def test_decoding_neither_grows_nor_compiles_again() -> None:
    outcome = endurance.decoding(300, "eager")
    assert (outcome.tries, outcome.lost) == (300, 0), outcome.seen


def test_discarded_models_leave_nothing() -> None:
    """In a process of its own: allocators of one that ran other tests may take 20 MiB more, or not."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        outcome = fresh.submit(endurance.discarding, 5, "aot_eager").result()
    assert (outcome.tries, outcome.lost) == (5, 0), outcome.seen


def test_models_that_calibrated_themselves_leave_nothing() -> None:
    outcome = endurance.discarding_calibrated(3)
    assert outcome.lost == 0, outcome.seen


def test_a_model_that_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    used = endurance._used

    def keeping(model: torch.nn.Module) -> list:
        kept.append(next(model.parameters()))
        return used(model)

    monkeypatch.setattr(endurance, "_used", keeping)
    assert endurance.discarding(2, "eager").lost > 0


def test_threads_get_the_results_of_one() -> None:
    outcome = endurance.calling(400)  # where Dynamo reorders its graphs, 5 to 13 of so many differ
    assert outcome.lost == 0, outcome.seen


def test_children_run_what_was_compiled() -> None:
    outcome = endurance.forking(3)
    assert outcome.lost == 0, outcome.seen


def test_plans_of_discarded_models_go_with_a_reset() -> None:
    """Dynamo keeps a backend's options, and so the plan in them, until it is told to forget."""
    model = endurance.tiny_model()
    endurance.compiled(model, endurance.planned(model), "eager")
    endurance._used(model)
    plan = weakref.ref(rana_compile.plan_of(model))
    del model
    torch.compiler.reset()
    gc.collect()
    assert plan() is None
