"""Budgets of every unit, one recording for many fits, and prices re-weighed by what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import ConfigError, Plan, correction
from rana_compile.adapters import FAMILIES
from rana_compile.calibration import calibration
from rana_compile.correction import Target, thinned
from rana_compile.fitting import Evidence, neuron_at
from rana_compile.flops import bytes_read, dense_flops
from rana_compile.passes.record import dense_handler
from rana_compile.plan import SitePlan
from rana_compile.recipes import Choice, Mlp
from rana_compile.types import Site


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def byte_share(plan: Plan) -> float:
    read = sum(bytes_read(s.flops_kept * dense_flops(s.site), 4, s.tensors) for s in plan.sites)
    return read / sum(bytes_read(dense_flops(s.site), 4, {}) for s in plan.sites)


def test_bytes_budget_counts_thresholds_too(model: nn.Module) -> None:
    plan = rana_compile.calibrate(model, tokens(8), bytes_budget=0.6, progress=False)
    assert byte_share(plan) == pytest.approx(0.6, rel=0.02)
    assert plan.flops_kept < 0.6
    assert plan.info["budget"] == {"unit": "bytes", "value": 0.6}


def test_quality_target_is_confirmed_on_held_back_batches(model: nn.Module) -> None:
    batches = tokens(8)
    strict, loose = (
        rana_compile.calibrate(model, batches, max_loss_increase=most, progress=False) for most in (0.002, 0.05)
    )
    assert 0 < strict.info["divergence"] <= 0.002 < loose.info["divergence"] <= 0.05
    assert strict.flops_kept > loose.flops_kept
    with calibration(model, batches, progress=False) as session:  # measured anew, by another way
        with rana_compile.adapted(model, loose) as run, torch.no_grad():
            apart = []
            for batch in session.held_back:
                p, q = (m(**batch).logits[0].log_softmax(-1) for m in (model, run))
                apart.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert sum(apart) / len(apart) == pytest.approx(loose.info["divergence"], rel=1e-3)


def test_any_quality_is_met_by_a_plan_near_the_cheapest_one() -> None:
    """Shares that no adapters reach are not tried."""
    plan = rana_compile.calibrate(tiny_llama(1), tokens(4), max_loss_increase=99, recipe="neuron", progress=False)
    assert plan.info["divergence"] < 99 and 0.1 < plan.flops_kept < 0.3


def test_unreachable_quality_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no plan within a loss increase of 1e-12 nats.*raise max_loss_increase"):
        rana_compile.calibrate(model, tokens(8), max_loss_increase=1e-12, recipe="neuron", progress=False)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"flops_budget": 0.5, "bytes_budget": 0.5}, "flops_budget and bytes_budget contradict each other"),
        ({"bytes_budget": 1.5}, r"bytes_budget is 1.5; expected a share in \(0, 1\]"),
        ({"bytes_budget": 0.0}, r"bytes_budget is 0.0; expected a share in \(0, 1\]"),
        ({"max_loss_increase": -1}, "max_loss_increase is -1; expected a positive number of nats"),
        ({"max_loss_increase": float("nan")}, "max_loss_increase is nan"),
        ({"bytes_budget": 0.5, "recipe": "rana"}, "this recipe takes flops_budget only"),
    ],
)
def test_bad_budgets(model: nn.Module, budgets: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rana_compile.calibrate(model, tokens(8), progress=False, **budgets)


def test_one_recording_serves_many_fits(model: nn.Module) -> None:
    batches = tokens(8)
    with calibration(model, batches, progress=False) as session:
        both = [session.fit(Target("flops", share)) for share in (0.8, 0.6)]
    alone = rana_compile.calibrate(model, batches, 0.6, progress=False)
    assert [s.live for s in both[1].sites] == [s.live for s in alone.sites]
    assert both[0].flops_kept > both[1].flops_kept
    assert both[0].info["divergence"] < both[1].info["divergence"]


def test_callable_recipe(model: nn.Module) -> None:
    def half(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
        return {e.site: neuron_at(e, share, "magnitude") for e in evidence}

    plan = rana_compile.calibrate(model, tokens(8), 0.5, recipe=half, progress=False)
    assert {s.family for s in plan.sites} == {"neuron"}
    assert plan.flops_kept == pytest.approx(0.5, rel=0.02)
    assert plan.info["recipe"] == "half"


def test_correction_keeps_the_better_plan(model: nn.Module) -> None:
    """Held-back batches judge: what is returned diverges no more than the first allocation."""
    with calibration(model, tokens(8), progress=False) as session:
        plan = session.fit(Target("flops", 0.6))
        predicted = sum(site.error for site in plan.sites)
        assert predicted == pytest.approx(plan.info["divergence"], rel=0.5)  # prices as measured, not as first guessed


def test_thinned_batches_are_spread_evenly() -> None:
    batches = [{"input_ids": t} for t in tokens(8)]
    places = {id(b): i for i, b in enumerate(batches)}
    for limit, kept in ((8 * 32, list(range(8))), (2 * 32, [0, 4]), (1, [0])):
        assert [places[id(b)] for b in thinned(batches, limit)] == kept


def with_thresholds_times(plan: Plan, factor: float) -> Plan:
    def scaled(entry: SitePlan) -> SitePlan:
        tensors = entry.tensors
        for i in range(len(entry.live)):
            tensors = FAMILIES[entry.family].scaled(tensors, i, factor)
        return replace(entry, tensors=tensors)

    return replace(plan, sites=tuple(scaled(entry) if entry.live else entry for entry in plan.sites))


def measured(model: nn.Module, plan: Plan, held_back: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """Increase of the loss of the batches' own next tokens, and divergence there: by another way."""
    rises, apart = [], []
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        for batch in held_back:
            p, q = (m(**batch).logits[:, :-1].double().log_softmax(-1) for m in (model, run))
            ids, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            text = (mask[:, 1:] * mask[:, :-1]).bool()
            rises.append((p - q)[text].gather(1, ids[:, 1:][text][:, None]))
            apart.append((p.exp() * (p - q)).sum(-1)[text])
    return float(torch.cat(rises).mean()), float(torch.cat(apart).mean())


def padded(batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """In pairs, the second of each behind ever more padding."""
    pairs = [torch.cat(batches[i : i + 2]).int() for i in range(0, len(batches), 2)]
    masks = [torch.ones_like(pair) for pair in pairs]
    for i, mask in enumerate(masks):
        mask[1, : i + 1] = 0
    return [{"input_ids": pair, "attention_mask": mask} for pair, mask in zip(pairs, masks, strict=True)]


@pytest.mark.parametrize("spread", [1e6, 1e-9])
@pytest.mark.parametrize("data", [tokens(8), padded(tokens(16))], ids=["text", "padded pairs of int32"])
def test_the_predicted_loss_increase_is_what_was_measured_as_far_as_that_tells(
    model: nn.Module, data: Any, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The divergence, times the measured ratio where nothing else is known of it, times 1 where nothing is measured."""
    monkeypatch.setattr(correction, "SPREAD", spread)
    with calibration(model, data, progress=False) as session:
        plan = session.fit(Target("flops", 0.6))
        higher = with_thresholds_times(plan, correction.HIGHER)
        (one, apart), (other, further) = (measured(model, each, session.held_back) for each in (plan, higher))
    ratio = (one + other) / (apart + further)
    assert abs(ratio - 1) > 0.01
    assert plan.loss_increase == pytest.approx(apart * (ratio if spread > 1 else 1), rel=2e-3)
    assert f"nats per token: predicted loss increase {plan.loss_increase:.4f}, divergence" in str(plan)


def test_few_tokens_move_the_predicted_loss_increase_less_than_many(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for count in (4, 64):
        rana_compile.calibrate(model, tokens(count), 0.6, progress=False)
    told = [r for r in caplog.records if r.msg.startswith("loss increase over divergence")]
    pulled = [(taken - 1) / (ratio - 1) for ratio, _, taken in (r.args for r in told)]  # type: ignore[misc]
    assert 0 < pulled[0] < pulled[1] < 1


def test_dense_outputs_are_computed_once_where_there_is_room(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the plan is the same."""
    data = tokens(8)  # two of them held back, with outputs of 16 KB
    dense: list[Site] = []

    def counted(site: Site, *rest: Any) -> Any:
        dense.append(site)
        return dense_handler(site, *rest)

    monkeypatch.setattr(correction, "dense_handler", counted)
    plans, passes = [], []
    for room in (0, 20_000, 1 << 30):
        monkeypatch.setattr(correction, "KEPT_BYTES", room)
        dense.clear()
        plans.append(rana_compile.calibrate(model, data, 0.6, progress=False))
        passes.append(dense.count(dense[0]))
    assert passes[0] > passes[1] > passes[2] == 2 + 1  # one more, by which it is seen to be causal
    assert len({plan.digest() for plan in plans}) == 1 and plans[0].info == plans[1].info == plans[2].info


def test_a_refitted_plan_has_a_loss_increase_of_its_own(model: nn.Module) -> None:
    plan = rana_compile.calibrate(model, tokens(8), 0.6, progress=False)
    again = rana_compile.refit(model, tokens(8, seed=5), plan, progress=False)
    assert None is not again.loss_increase != plan.loss_increase is not None


def test_a_plan_that_adapts_nothing_increases_no_loss(model: nn.Module) -> None:
    assert rana_compile.calibrate(model, tokens(4), 1.0, "neuron", progress=False).loss_increase == 0


def both_ways() -> nn.Module:
    """Transformers would have it generate, though it sees the next token."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    return BertLMHeadModel(BertConfig(num_hidden_layers=1, initializer_range=0.2, **sizes)).eval()


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), [{"input": torch.ones(64, 64)}] * 4),
        (both_ways, tokens(4)),
    ],
    ids=["no text", "not causal"],
)
def test_where_no_next_tokens_are_predicted_no_loss_increase_is(model: Callable[[], nn.Module], data: Any) -> None:
    plan = rana_compile.calibrate(model(), data, 0.6, progress=False)
    assert plan.loss_increase is None
    assert "on held-back batches, nats per token: divergence" in str(plan)
