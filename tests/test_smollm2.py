"""A few truths on a real model, SmolLM2-135M, and text that no fit has seen."""

import copy
import logging
import math
from collections.abc import Iterator

import pytest
import torch
from inputs import load_smollm2, mean_nll, pydoc_topics
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan
from rana_compile.testing import count_compilations

WINDOW = 384


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    model, tokenizer = load_smollm2(torch.float32)
    yield model, *pydoc_topics(tokenizer, WINDOW, calibration=10, held_out=6)


@pytest.fixture(scope="module")
def plan(loaded: tuple[nn.Module, Tensor, Tensor]) -> Plan:
    model, calibration, _ = loaded
    return rana_compile.calibrate(
        model, calibration.split(1), flops_budget=0.6, recipe="neuron", exclude=["lm_head"], progress=False
    )


def test_perplexity_and_cost_at_sixty_percent(loaded: tuple[nn.Module, Tensor, Tensor], plan: Plan) -> None:
    model, _, held_out = loaded
    dense = mean_nll(model, held_out)
    with rana_compile.adapted(model, plan) as run:
        adapted = mean_nll(run, held_out)
        kept = run.flops_kept
    assert len(plan.adapted) == 120
    assert math.exp(adapted - dense) <= 1.25
    assert plan.flops_kept == pytest.approx(0.6, rel=0.01)
    assert kept == pytest.approx(0.6, rel=0.03)  # on text that thresholds were not fitted on
    assert [s.reason for s in plan.skipped if s.name == "lm_head.weight"] == ["excluded by lm_head"]


def test_full_budget_gives_dense_logits(loaded: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, calibration, held_out = loaded
    plan = rana_compile.calibrate(model, calibration[:2].split(1), flops_budget=1.0, recipe="neuron", progress=False)
    ids = held_out[:1]
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        torch.testing.assert_close(run(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-4)


def test_one_decoded_token_through_the_kernels(loaded: tuple[nn.Module, Tensor, Tensor], plan: Plan) -> None:
    model, _, held_out = loaded
    ids = held_out[:1, :1]
    fast = torch.compile(model, backend="rana", options={"plan": plan})
    with torch.no_grad():
        got = fast(input_ids=ids, use_cache=False).logits
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        expected = run(input_ids=ids, use_cache=False).logits
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_self_calibration_in_a_generate_loop(
    loaded: tuple[nn.Module, Tensor, Tensor], plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    """On the tokens of an explicit calibration: one swap, no compilation after it, and about the same quality."""
    model, calibration, held_out = loaded
    caplog.set_level(logging.INFO, "rana_compile.self_calibration")
    fast = copy.deepcopy(model)
    options = {"flops_budget": 0.6, "recipe": "neuron", "exclude": ["lm_head"], "compiler": "eager"}
    fast.compile(backend="rana", options=options | {"calibration_tokens": calibration.numel()})

    def lines() -> list[str]:
        return [message for message in caplog.messages if message.startswith("rana:")]

    for ids in calibration.split(1):
        assert not lines()
        fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    (line,) = lines()
    with count_compilations() as counts:
        ids = calibration[:1]
        fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert counts.graphs == 0 and lines() == [line]
    assert "120 of 120 sites adapted" in line and float(line.split("divergence ")[1].split()[0]) < 0.3
    dense = mean_nll(model, held_out)
    increases = []
    for one in (rana_compile.plan_of(fast), plan):
        with rana_compile.adapted(model, one) as run:
            increases.append(mean_nll(run, held_out) - dense)
    print(f"{line}; loss {dense:.4f}, increase {increases[0]:.4f} against {increases[1]:.4f}")
    assert increases[0] < 1.1 * increases[1]
