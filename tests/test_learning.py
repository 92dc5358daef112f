"""Thresholds learnt end to end: the gradient of a mask, and what learning changes and leaves alone."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import ConfigError, Plan, correction, learning, objective
from rana_compile.adapters import Tensors
from rana_compile.adapters.base import SOFTNESS, kept
from rana_compile.kernels.reference import apply_threshold, is_dropped, without
from rana_compile.types import Site

Result = tuple[Mapping[Site, tuple[str, Tensors]], Mapping[Site, list[float]]]


def calibrate(model: nn.Module, recipe: str = "auto", **kwargs: Any) -> Plan:
    return rana_compile.calibrate(model, tokens(8), 0.6, recipe, progress=False, **kwargs)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(layers=1)


@pytest.fixture(scope="module")
def unlearnt(model: nn.Module) -> Plan:
    return calibrate(model, learning_steps=0)


def inputs(seed: int = 0) -> list[Tensor]:
    """value [2, 5, 12], z, threshold [12] and scale [2, 5]."""
    generator = torch.Generator().manual_seed(seed)
    value, z = torch.randn(2, 2, 5, 12, generator=generator)
    threshold, scale = torch.rand(12, generator=generator) + 0.1, torch.rand(2, 5, generator=generator) + 0.5
    return [value, z, threshold, scale]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_mask_that_learns_keeps_what_the_others_keep(scaled: bool) -> None:
    value, z, threshold, scale = inputs()
    z[:, 0, :4], z[:, 1, 5], threshold[:2] = 0.0, torch.nan, 0.0
    of = scale if scaled else None
    learnt = threshold.clone().requires_grad_()
    assert torch.equal(kept(value, z, learnt, of), without(value, is_dropped(z, threshold, of)))
    assert torch.equal(kept(value, z, threshold, of), without(value, is_dropped(z, threshold, of)))
    expected = apply_threshold(z, threshold, of)
    torch.testing.assert_close(kept(z, z, learnt, of), expected, rtol=0, atol=0, equal_nan=True)
    assert expected[:, 1, 5].isnan().all() and (kept(value, z, learnt, of) == value)[:, 0, :2].all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_in_the_backward_pass_a_mask_is_soft(scaled: bool, own: bool) -> None:
    value, z, threshold, scale = (t.requires_grad_() for t in inputs())
    of = scale if scaled else None
    value = z if own else value
    hard = (~is_dropped(z, threshold, of)).float()
    strength = z.abs().log() - threshold.log() + (scale.log()[..., None] if scaled else 0.0)
    soft = (strength / SOFTNESS).sigmoid()
    upstream = inputs(seed=1)[0]
    leaves = [*([] if own else [value]), z, threshold, *([scale] if scaled else [])]
    expected = torch.autograd.grad(value * (hard + soft - soft.detach()), leaves, upstream)
    for g, e in zip(torch.autograd.grad(kept(value, z, threshold, of), leaves, upstream), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_zeros_have_finite_gradients() -> None:
    value, z, threshold, scale = inputs()
    z[..., :2], threshold[1:3] = 0.0, 0.0
    leaves = [t.requires_grad_() for t in (value, z, threshold, scale)]
    for g in torch.autograd.grad(kept(value, z, threshold, scale).sum(), leaves):
        assert g.isfinite().all() and g.any()


def test_a_mask_that_does_not_learn_has_the_plain_gradient() -> None:
    value, z, threshold, scale = inputs()
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(kept(z, z, threshold, scale), z, value)
    assert torch.equal(gradient, without(value, is_dropped(z, threshold, scale)))
    with torch.no_grad():
        assert not kept(z, z, threshold.requires_grad_()).requires_grad


def test_a_learnt_plan_costs_what_was_asked_and_is_no_worse(model: nn.Module, unlearnt: Plan) -> None:
    model = copy.deepcopy(model)
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = calibrate(model, learning_steps=3)
    assert abs(plan.flops_kept - 0.6) < 0.02
    assert plan.digest() == calibrate(model, learning_steps=3).digest()
    assert plan.info["divergence"] <= unlearnt.info["divergence"]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_learning_moves_thresholds_and_nothing_else(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Result]] = []

    def learn(run: Any, batches: Any, adapters: Any, *others: Any) -> Result:
        adapters = {site: (name, {k: t.clone() for k, t in of.items()}) for site, (name, of) in adapters.items()}
        for _, of in adapters.values():
            if "threshold" in of:
                of["threshold"][..., 0] = 0.0
        given = {site: (name, {k: t.clone() for k, t in of.items()}) for site, (name, of) in adapters.items()}
        seen.append((given, learning.learn(run, batches, adapters, *others)))
        for site, (_, of) in adapters.items():
            assert all(torch.equal(t, given[site][1][k]) for k, t in of.items())
        return seen[-1][1]

    monkeypatch.setattr(correction, "learn", learn)
    calibrate(model, learning_steps=2)
    ((given, (learnt, live)),) = seen
    assert learnt.keys() == given.keys() == live.keys()
    for site, (name, before) in given.items():
        assert learnt[site][0] == name and learnt[site][1].keys() == before.keys()
        for key, old in before.items():
            new = learnt[site][1][key]
            assert not new.requires_grad
            if key != "threshold":
                assert torch.equal(new, old)
                continue
            assert new.isfinite().all() and not torch.equal(new, old)
            assert torch.equal(new == 0, old == 0) and (new >= 0).all()
        sizes = [old.shape[-1] for key, old in before.items() if key in ("threshold", "gate_threshold")]
        assert all(0 <= n <= max(sizes) for n in live[site])


def test_what_learning_gains_is_predicted(model: nn.Module, unlearnt: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[Any] = []
    fitted = correction.Fitter.fitted

    def halved(self: correction.Fitter, choice: Any, batches: Any) -> correction.Fitted:
        found = fitted(self, choice, batches)
        return dataclasses.replace(found, divergence=found.divergence / 2) if learnt else found

    monkeypatch.setattr(
        correction, "learn", lambda run, b, adapters, live, *others: learnt.append(b) or (adapters, live)
    )
    monkeypatch.setattr(correction.Fitter, "fitted", halved)
    plan = calibrate(model, learning_steps=1)
    gained = plan.info["divergence"] / unlearnt.info["divergence"]
    assert gained < 0.6
    predicted, before = (sum(s.error for s in p.sites) for p in (plan, unlearnt))
    assert predicted == pytest.approx(gained * before)


def test_learning_brings_the_divergence_down_on_its_own_batches(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []

    def learn(run: Any, batches: Any, adapters: Any, *others: Any) -> Result:
        result = learning.learn(run, batches, adapters, *others)
        handlers = [correction.Adapted(adapters), correction.Adapted(result[0])]
        with torch.no_grad():
            outputs = [[learning.main_output(run(h, b)) for b in batches] for h in (learning.dense_handler, *handlers)]
        found.extend(sum(map(objective.divergence, outputs[0], each)) for each in outputs[1:])
        return result

    monkeypatch.setattr(correction, "learn", learn)
    calibrate(model, learning_steps=16)
    before, after = found
    assert after < before


@pytest.mark.parametrize("steps", [-1, True, 1.5])
def test_learning_steps_is_a_number_of_steps(model: nn.Module, steps: Any) -> None:
    with pytest.raises(ConfigError, match="learning_steps"):
        calibrate(model, learning_steps=steps)


def test_the_papers_recipe_learns_nothing() -> None:
    model = tiny_llama(layers=1, intermediate_size=256, num_key_value_heads=4)
    plans = [
        rana_compile.calibrate(model, tokens(8), 0.8, "rana", learning_steps=steps, progress=False) for steps in (4, 0)
    ]
    assert plans[0].digest() == plans[1].digest()


def test_on_a_cpu_nothing_is_learnt_unless_asked_for(model: nn.Module, unlearnt: Plan) -> None:
    assert calibrate(model).digest() == unlearnt.digest()


def test_thresholds_that_decide_whatever_comes_stay_as_they_are() -> None:
    given = torch.tensor([0.0, 1.0, torch.inf, 2.0])
    by = torch.full((4,), 0.5, requires_grad=True)
    moved = learning._moved(given, by)
    torch.testing.assert_close(moved, torch.tensor([0.0, math.exp(0.5), torch.inf, 2 * math.exp(0.5)]))
    moved[torch.tensor([True, True, False, True])].sum().backward()
    assert by.grad is not None and by.grad.isfinite().all() and by.grad[0] == by.grad[2] == 0


def test_want_of_memory_leaves_the_plan_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    model = tiny_llama(layers=1)
    plain = rana_compile.calibrate(model, tokens(4), 0.6, progress=False, learning_steps=0)
    monkeypatch.setattr("rana_compile.correction.learn", full)
    plan = rana_compile.calibrate(model, tokens(4), 0.6, progress=False, learning_steps=4)
    assert plan.digest() == plain.digest() and "want of memory" in caplog.text


def test_a_step_without_finite_gradients_is_left_out_and_told(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, calls = learning._gradients, []

    def broken(*of: Any) -> tuple[Tensor, Tensor, float]:
        errors, costs, cost = whole(*of)
        calls.append(cost)
        return (errors * torch.nan if len(calls) == 2 else errors), costs, cost

    monkeypatch.setattr(learning, "_gradients", broken)
    plan = calibrate(model, learning_steps=3)
    assert len(calls) == 3 and "1 of 3 learning steps were left out" in caplog.text
    assert all(t.isfinite().all() for site in plan.sites for t in site.tensors.values())
