"""No plan given: dense at first, then adapted, once; or dense for good, with the reason."""

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import RanaError
from rana_compile.passes.find import find_sites
from rana_compile.passes.replay import Replay
from rana_compile.testing import count_compilations, graphs_of

SMALL = {"calibration_tokens": 100, "max_divergence": 9.0, "compiler": "eager"}


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama(layers=1)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, "rana_compile.self_calibration")
    yield caplog


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    other = copy.deepcopy(model)
    other.compile(backend="rana", options=SMALL | options)
    return other


def run(model: Any, count: int, seed: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return [model(input_ids=ids, use_cache=False).logits for ids in tokens(count, seed=seed)]


def generate(model: Any, ids: Tensor, count: int = 6, **settings: Any) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **settings)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_one_swap_in_a_generate_loop(model: nn.Module, log: Any, cache: str | None, compiler: str) -> None:
    if compiler == "inductor" and cache is None:
        pytest.skip("the static cache compiles fewer graphs; one of them is enough")
    fast = compiled(model, compiler=compiler, calibration_tokens=100)
    prompts = [ids[:, :24] for ids in tokens(8)]
    for i, ids in enumerate(prompts):
        seen = i >= 2  # Dynamo has seen both lengths by now
        with torch._dynamo.config.patch(error_on_recompile=seen), count_compilations() as counts:
            got = generate(fast, ids, cache_implementation=cache)
        assert counts.graphs == 0 or not seen
        if not log.messages:  # nothing logged: still dense
            assert torch.equal(got, generate(model, ids, cache_implementation=cache))
    (line,) = log.messages
    assert "9.0" not in line and "calibrated on" in line and "5 of 5 sites adapted" in line
    assert "(asked 70.0%)" in line and "divergence" in line and "0 weights skipped" in line
    plan = rana_compile.plan_of(fast)
    assert plan.flops_kept == pytest.approx(0.7, rel=0.02)
    model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
    assert torch.equal(got, generate(model, prompts[-1], cache_implementation=cache))


def test_same_plan_as_an_explicit_calibration(model: nn.Module) -> None:
    """Prompts of generate give logits for one token only: their other rows must price errors all the same."""
    fast = compiled(model, calibration_tokens=32 * 8, recipe="neuron", min_features=0)
    for ids in tokens(8):
        generate(fast, ids, 1)
    own = rana_compile.plan_of(fast)
    plan = rana_compile.calibrate(model, tokens(8), flops_budget=0.7, recipe="neuron", progress=False)
    for a, b in zip(own.sites, plan.sites, strict=True):
        assert (a.site.name, a.family) == (b.site.name, b.family)
        assert a.flops_kept == pytest.approx(b.flops_kept, rel=0.02)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_lengths_that_are_symbolic_from_the_first_call_on(compiler: str) -> None:
    """Dynamo starts over while it compiles such a graph, and clears what it had first."""
    fast = tiny_llama(layers=1)
    fast.compile(backend="rana", dynamic=True, options=SMALL | {"compiler": compiler})
    with torch.no_grad(), count_compilations() as counts:
        for length in (24, 32, 17, 40):
            fast(input_ids=tokens(1, length=length)[0], use_cache=False)
    assert counts.graphs == 1
    plan = rana_compile.plan_of(fast)
    ids = tokens(1, length=21, seed=5)[0]
    with torch.no_grad(), rana_compile.adapted(fast, plan) as formulas:
        expected = formulas(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_prefill_and_decode_share_one_plan_and_may_be_saved(model: nn.Module, tmp_path: Any) -> None:
    fast = compiled(model)
    with pytest.raises(RanaError, match="was not called since"):
        rana_compile.plan_of(fast)
    run(fast, 2)
    with pytest.raises(RanaError, match="still calibrating, 64 of 100 tokens kept, 64 seen"):
        rana_compile.plan_of(fast)
    run(fast, 3)
    plan = rana_compile.plan_of(fast)
    (ids,) = tokens(1, length=1)
    with torch.no_grad(), rana_compile.adapted(fast, plan) as formulas:
        expected = formulas(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    plan.save(tmp_path / "plan.safetensors")
    rana_compile.Plan.load(tmp_path / "plan.safetensors").check(model)


def test_too_far_from_dense_stays_dense_and_says_so(model: nn.Module, log: Any) -> None:
    fast = compiled(model, max_divergence=0.0, flops_budget=0.5)
    outputs = run(fast, 6)
    for got, exact in zip(outputs, run(model, 6), strict=True):
        torch.testing.assert_close(got, exact)
    (line,) = log.messages
    assert "stays dense" in line and "exceeds max_divergence=0.0" in line
    with pytest.raises(RanaError, match="exceeds max_divergence"):
        rana_compile.plan_of(fast)


@pytest.mark.parametrize(("wanted", "said"), [(100, "calibrated on"), (1000, "stays dense: of 4,000 tokens seen the")])
def test_of_single_tokens_ever_fewer_are_kept(log: Any, wanted: int, said: str) -> None:
    """Each would bring its whole cache. Enough of a small wish is kept, of a larger one too little to fit on."""
    fast = torch.compile(
        nn.Sequential(nn.Linear(64, 64)), backend="rana", options=SMALL | {"calibration_tokens": wanted}
    )
    with torch.no_grad():
        for x in torch.randn(4 * wanted, 1, 64):
            fast(x)
    (line,) = log.messages
    assert said in line


@pytest.mark.parametrize("change", ["load_state_dict", "copy_"])
def test_replaced_weights_are_calibrated_again(model: nn.Module, log: Any, change: str) -> None:
    fast = compiled(model)
    run(fast, 5)
    first = rana_compile.plan_of(fast)
    torch.manual_seed(7)
    other = tiny_llama(layers=1)
    if change == "copy_":
        with torch.no_grad():
            for p, q in zip(fast.parameters(), other.parameters(), strict=True):
                p.copy_(q)
    else:
        fast.load_state_dict(other.state_dict())
    for got, exact in zip(run(fast, 2), run(other, 2), strict=True):
        torch.testing.assert_close(got, exact)  # dense again, with the new weights
    run(fast, 4)
    assert rana_compile.plan_of(fast) is not first
    rana_compile.plan_of(fast).check(other)
    assert "its weights were overwritten" in log.messages[1]


def test_weights_that_never_rest_stay_dense(model: nn.Module, log: Any) -> None:
    fast = compiled(model, calibration_tokens=10_000)
    for _ in range(6):
        run(fast, 1)
        with torch.no_grad():
            for p in fast.parameters():
                p.mul_(1.001)
    assert "stays dense: the weights changed while calibrating" in log.messages[-1]
    assert len(log.messages) == 4


def test_two_models_in_one_process(model: nn.Module) -> None:
    torch.manual_seed(5)
    other = tiny_llama(layers=1)
    first, second = compiled(model), compiled(other)
    for seed in range(5):
        run(first, 1, seed), run(second, 1, seed)
    plans = rana_compile.plan_of(first), rana_compile.plan_of(second)
    plans[0].check(model), plans[1].check(other)
    with pytest.raises(RanaError):
        plans[0].check(other)


def test_excluded_and_small_linears_are_left_alone(model: nn.Module) -> None:
    fast = compiled(model, exclude=["lm_head"], min_features=50)
    run(fast, 5)
    plan = rana_compile.plan_of(fast)
    reasons = {s.name: s.reason for s in plan.skipped}
    assert reasons["lm_head.weight"] == "excluded by lm_head"
    assert "fewer than min_features=50" in reasons["model.layers.0.self_attn.k_proj.weight"]
    assert "model.layers.0.self_attn.q_proj" in {s.site.name for s in plan.sites}


def test_an_excluded_tied_head_counts_among_all_linears() -> None:
    """Its weight is the embedding's in the graph."""
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    fast = compiled(model, exclude=["lm_head"])
    run(fast, 5)
    plan = rana_compile.plan_of(fast)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert plan.model_flops == 2 * linears


def test_an_abandoned_model_is_not_kept_alive() -> None:
    model = compiled(tiny_llama(layers=1), calibration_tokens=10_000)
    run(model, 2)
    weight = weakref.ref(model.lm_head.weight)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert weight() is None


def test_a_hidden_state_is_compared_by_its_relative_error(log: Any) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64))
    fast = torch.compile(block, backend="rana", options=SMALL | {"flops_budget": 0.5, "calibration_tokens": 300})
    inputs = [torch.randn(50, 64) for _ in range(8)]
    with torch.no_grad():
        for x in inputs:
            got = fast(x)
        error = float((got - block(x)).norm() / block(x).norm())
    measured = float(log.messages[0].split("divergence ")[1].split(" ")[0])
    assert measured == pytest.approx(error, rel=0.2)


def test_parts_of_a_broken_graph_make_one_plan() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            torch._dynamo.graph_break()
            return self.second(x)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = Broken(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.part(x))

    model = Whole()
    fast = torch.compile(model, backend="rana", options=SMALL)
    with count_compilations() as counts, torch.no_grad():
        for _ in range(6):
            fast(torch.randn(30, 64))
    assert counts.graphs == 3 and counts.breaks > 0
    plan = rana_compile.plan_of(model)
    assert {s.site.name for s in plan.sites} == {"part.first", "part.second", "head"}
    plan.check(model)
    told = rana_compile.explain(model, torch.randn(30, 64), options={"plan": plan})
    assert told.graphs == 3 and [o.action for o in told.sites] == ["adapted"] * 3
    with pytest.raises(RanaError, match="compiles the model in parts, and in one"):
        rana_compile.calibrate(model, [{"x": torch.randn(30, 64)} for _ in range(4)], progress=False)


def test_last_rows_only_is_undone_for_recording(model: nn.Module) -> None:
    ids = tokens(1, length=9)[0]
    (gm,) = graphs_of(model, input_ids=ids, use_cache=False, logits_to_keep=1)
    replay = Replay(gm, find_sites(gm).matches)
    seen: dict[str, int] = {}

    def handler(site: Any, x: Tensor, weights: Any, biases: Any) -> Any:
        seen[site.name] = x.shape[:-1].numel()
        return [nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]

    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    parameters = dict(model.named_parameters())
    from rana_compile.passes.names import source_name

    buffers = dict(model.named_buffers())
    values = [ids if (name := source_name(n)) is None else (parameters | buffers)[name].detach() for n in nodes]
    output = replay.run(values, handler)
    assert set(seen.values()) == {9}
    assert output.logits is not None
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(input_ids=ids, use_cache=False).logits)
