"""The modes, wrappers and accidents that a compiled model meets in scripts."""

import copy
from typing import Any

import pytest
import torch
from support import OLD_DYNAMO, plan_of, tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import ConfigError, Plan, PlanError
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.types import Site

CHAOS = 0.15  # in 8 bits of mantissa a coordinate at its threshold falls either way, and random weights spread that


@pytest.fixture(scope="module")
def expected(model: nn.Module, plan: Plan) -> dict[int, Tensor]:
    """Logits of the formulas by length: many rows, and one."""
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        return {n: run(input_ids=tokens(1, length=n, seed=3)[0], use_cache=False).logits for n in (12, 1)}


def compiled(model: nn.Module, plan: Plan, **options: Any) -> nn.Module:
    other = copy.deepcopy(model)
    other.compile(backend="rana", options={"plan": plan, "compiler": "eager", **options})
    return other


def logits(model: Any, length: int) -> Tensor:
    return model(input_ids=tokens(1, length=length, seed=3)[0], use_cache=False).logits


def linear_plan(module: nn.Module, *names: str, threshold: float = 0.3) -> Plan:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    entries = []
    for name in names:
        d_out, d_in = parameters[f"{name}.weight"].shape
        site = Site(name, "linear", (f"{name}.weight",), d_in, (d_out,))
        entries.append((site, "neuron", neuron_tensors(torch.full((1, d_in), threshold))))
    return plan_of(module, *entries)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_modes(model: nn.Module, plan: Plan, expected: dict[int, Tensor], mode: Any) -> None:
    fast = compiled(model, plan)
    with mode():
        for length, exact in expected.items():
            torch.testing.assert_close(logits(fast, length), exact, rtol=1e-4, atol=1e-4, check_dtype=True)


def test_one_mode_after_another(model: nn.Module, plan: Plan, expected: dict[int, Tensor]) -> None:
    """What inference mode has packed serves training, and the other way round."""
    fast = compiled(model, plan)
    with torch.inference_mode():
        logits(fast, 1), logits(fast, 12)
    logits(fast, 12).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())
    with torch.no_grad():
        torch.testing.assert_close(logits(fast, 1), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model: nn.Module, plan: Plan, expected: dict[int, Tensor], dtype: torch.dtype) -> None:
    fast = compiled(model, plan)
    for length, exact in expected.items():
        with torch.no_grad(), torch.autocast("cpu", dtype):
            got, dense = logits(fast, length), logits(model, length)
        assert got.dtype == dense.dtype
        assert (got.float() - exact).norm() < CHAOS * exact.norm()
    with torch.no_grad():  # and without it again
        torch.testing.assert_close(logits(fast, 1), expected[1], rtol=1e-4, atol=1e-4)


def test_self_calibration_under_inference_mode_and_autocast(model: nn.Module) -> None:
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options={"calibration_tokens": 100, "max_divergence": 9.0, "compiler": "eager"})
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for ids in tokens(5):
            got = fast(input_ids=ids, use_cache=False).logits
        plan = rana_compile.plan_of(fast)
        assert got.dtype == logits(model, 4).dtype
    plan.check(model)
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        exact = run(input_ids=tokens(5)[4], use_cache=False).logits
    assert (got.float() - exact).norm() < CHAOS * exact.norm()


def test_tied_weights() -> None:
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    plan = rana_compile.calibrate(model, tokens(4), flops_budget=0.6, recipe="neuron", progress=False)
    assert "lm_head" in {s.site.name for s in plan.adapted}
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        exact = run(input_ids=tokens(1, length=1, seed=3)[0], use_cache=False).logits
        torch.testing.assert_close(logits(compiled(model, plan), 1), exact, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """One module used twice, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(self.a(x).relu())).relu())


@pytest.mark.parametrize("rows", [1, 5])
def test_weights_shared_between_layers(rows: int) -> None:
    model = Shared()
    plan = linear_plan(model, "a", "b", "c")
    x = torch.randn(rows, 64)

    def mask(t: Tensor) -> Tensor:
        return t * (t.abs() >= 0.3)

    with torch.no_grad():
        a, b = model.a.weight.t(), model.b.weight.t()
        exact = mask((mask(mask((mask(x) @ a).relu()) @ a) @ b).relu()) @ b
        fast = torch.compile(model, backend="rana", options={"plan": plan, "compiler": "eager"})
        torch.testing.assert_close(fast(x), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(OLD_DYNAMO, reason="Dynamo of torch 2.11 does not see that a shared parameter's strides changed")
def test_a_shared_weight_may_be_freed_for_one_layer_and_dense_in_the_other() -> None:
    """The dense layer's kernel wants rows side by side, which the layout of the adapted one does not have."""
    model = Shared()
    plan = plan_of(
        model,
        (Site("b", "linear", ("b.weight",), 64, (64,)), "neuron", neuron_tensors(torch.full((1, 64), 0.3))),
        (Site("c", "linear", ("c.weight",), 64, (64,)), "dense", {}),
    )
    x = torch.randn(1, 64)
    options = {"plan": plan, "compiler": "eager", "free_dense_weights": True}
    fast = torch.compile(model, backend="rana", options=options)
    with torch.no_grad():
        hidden = model.a(model.a(x).relu())
        exact = model.c(model.b(hidden * (hidden.abs() >= 0.3)).relu())
        for _ in range(3):
            torch.testing.assert_close(fast(x), exact, rtol=1e-4, atol=1e-5)
    assert not model.b.weight.is_contiguous()


def test_shared_weights_are_calibrated() -> None:
    model = Shared()
    fast = torch.compile(model, backend="rana", options={"calibration_tokens": 300, "compiler": "eager"})
    with torch.no_grad():
        for _ in range(8):
            fast(torch.randn(50, 64))
    assert {s.site.name for s in rana_compile.plan_of(model).sites} == {"a", "b", "c"}


def test_functional_call_with_the_models_own_and_with_other_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plan = linear_plan(model, "0")
    x = torch.randn(4, 64)
    call = torch.compile(
        lambda p, x: torch.func.functional_call(model, p, x),
        backend="rana",
        options={"plan": plan, "compiler": "eager"},
    )
    other = {k: v.detach() + 1 for k, v in model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(call(other, x), torch.func.functional_call(model, other, x))
        direct = torch.compile(model, backend="rana", options={"plan": plan, "compiler": "eager"})
        kept = x * (x.abs() >= 0.3)
        torch.testing.assert_close(direct(x), model(kept), rtol=1e-4, atol=1e-5)


def test_lora_wrapped_linears_have_their_base_adapted() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_llama(layers=1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options={"calibration_tokens": 100, "max_divergence": 9.0, "compiler": "eager"})
    with torch.no_grad():
        for ids in tokens(5):
            got = fast(input_ids=ids, use_cache=False).logits
    plan = rana_compile.plan_of(fast)
    adapted = {name for s in plan.sites for name in s.site.weights}
    prefix = "base_model.model.model.layers.0."
    assert {f"{prefix}self_attn.q_proj.base_layer.weight", f"{prefix}mlp.down_proj.base_layer.weight"} <= adapted
    reasons = {s.name: s.reason for s in plan.skipped}
    assert "fewer than min_features=32" in reasons[f"{prefix}mlp.down_proj.lora_A.default.weight"]
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        exact = run(input_ids=tokens(5)[4], use_cache=False).logits
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


class Int8Linear(nn.Module):
    """Weight-only quantisation as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-128, 127, (64, 64), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(64, 1) / 64)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_quantised_linears_are_skipped_with_a_reason() -> None:
    model = nn.Sequential(Int8Linear(), nn.ReLU(), nn.Linear(64, 64))
    told = rana_compile.explain(model, torch.randn(4, 64))
    assert [o.site.name for o in told.sites] == ["2"]
    assert [s.reason for s in told.skipped] == ["its weight is computed in the graph, not a parameter of the module"]


def test_a_model_quantised_by_a_library_is_skipped_with_a_reason() -> None:
    """Its parameters claim to be float32; what they are is a subclass that unpacks itself."""
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quanto.quantize(model, weights=quanto.qint8, exclude="2")
    quanto.freeze(model)
    fast = torch.compile(
        model, backend="rana", options={"calibration_tokens": 64, "compiler": "eager", "max_divergence": 9.0}
    )
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(20, 64)
            assert fast(x).shape == x.shape
    plan = rana_compile.plan_of(fast)
    assert [s.site.name for s in plan.sites] == ["2"]
    assert [s.name for s in plan.skipped] == ["0.weight"]
    assert "its weight is a WeightQBytesTensor; only plain tensors are adapted" in plan.skipped[0].reason


def test_dense_weights_may_be_freed(model: nn.Module, plan: Plan) -> None:
    """Parameters become views of what the kernels read: the same values, once in memory; compiled once more."""
    from rana_compile.binding import bind
    from rana_compile.testing import count_compilations

    def shared(model: nn.Module) -> list[bool]:
        parameters = dict(model.named_parameters())
        places = []
        for entry in plan.adapted:
            weights = [parameters[name] for name in entry.site.weights]
            layout = bind(plan, entry, weights).packed(weights)["weight_t"]
            places += [w.untyped_storage().data_ptr() == layout.untyped_storage().data_ptr() for w in weights]
        return places

    usual, fast = compiled(model, plan), compiled(model, plan, free_dense_weights=True)
    with torch.no_grad():
        exact = {length: logits(usual, length) for length in (12, 1)}
        assert not any(shared(usual))
        for length in (12, 1, 12, 1):
            torch.testing.assert_close(logits(fast, length), exact[length])
        with count_compilations() as counts:
            logits(fast, 12), logits(fast, 1)
    assert all(shared(fast)) and counts.graphs == 0
    for name, value in fast.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    torch.manual_seed(9)
    fast.load_state_dict(tiny_llama(layers=1).state_dict())
    with torch.no_grad(), pytest.raises(PlanError, match="its weights were overwritten"):
        logits(fast, 1)


def test_reloaded_weights_are_an_error_with_a_plan(model: nn.Module, plan: Plan) -> None:
    fast = compiled(model, plan)
    with torch.no_grad():
        logits(fast, 1), logits(fast, 12)
    torch.manual_seed(9)
    fast.load_state_dict(tiny_llama(layers=1).state_dict())
    for length in (1, 12):
        with torch.no_grad(), pytest.raises(PlanError, match="its weights were overwritten"):
            logits(fast, length)
    fast.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits(fast, 1)  # the plan's weights are back


def test_moved_to_another_dtype_is_an_error_with_a_plan(model: nn.Module, plan: Plan) -> None:
    fast = compiled(model, plan)
    with torch.no_grad():
        logits(fast, 12)
        fast.to(torch.bfloat16)
        with pytest.raises(Exception, match="values or dtype differ, now"):
            logits(fast, 12)


def test_moved_to_another_dtype_is_calibrated_again(model: nn.Module) -> None:
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options={"calibration_tokens": 100, "max_divergence": 9.0, "compiler": "eager"})
    with torch.no_grad():
        for ids in tokens(5):
            fast(input_ids=ids, use_cache=False)
        first = rana_compile.plan_of(fast)
        fast.to(torch.bfloat16)
        for ids in tokens(6):
            fast(input_ids=ids, use_cache=False)
    second = rana_compile.plan_of(fast)
    assert second is not first
    second.check(copy.deepcopy(model).to(torch.bfloat16))


@pytest.mark.parametrize("options", [{"exclude": "lm_head"}, {"include": ["*.mlp.*"]}, {"min_features": 50}])
def test_knobs_select_from_a_plan(model: nn.Module, plan: Plan, options: dict[str, Any]) -> None:
    told = rana_compile.explain(model, tokens(1)[0], options={"plan": plan, **options}, use_cache=False)
    kept = {o.site.name for o in told.sites if o.action == "adapted"}
    chosen = [s for s in plan.sites if s.site.name in kept]
    assert 0 < len(chosen) < len(plan.sites)
    part = Plan(tuple(chosen), (), 0.6, 1.0)
    with rana_compile.adapted(model, part) as run, torch.no_grad():
        exact = run(input_ids=tokens(1, length=12, seed=3)[0], use_cache=False).logits
        torch.testing.assert_close(logits(compiled(model, plan, **options), 12), exact, rtol=1e-4, atol=1e-4)


def test_a_pattern_that_matches_nothing_is_an_error(model: nn.Module, plan: Plan) -> None:
    with torch.no_grad(), pytest.raises(Exception, match="exclude='lm_haed' matches no parameter"):
        logits(compiled(model, plan, exclude="lm_haed"), 4)
    with pytest.raises(ConfigError, match="matches no parameter"):
        rana_compile.explain(model, tokens(1)[0], options={"exclude": "lm_haed"})


def test_dynamic_and_fullgraph_belong_to_torch_compile(model: nn.Module, plan: Plan) -> None:
    from rana_compile.testing import count_compilations

    options = {"plan": plan, "compiler": "eager"}
    fast = torch.compile(model, backend="rana", options=options, dynamic=True, fullgraph=True)
    with count_compilations() as counts, torch.no_grad():
        for length in (5, 9, 12):
            logits(fast, length)
    assert counts.graphs == 1


def test_mode_reaches_inductor(model: nn.Module, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    seen: list[Any] = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches: seen.append(config_patches) or gm)
    fast = copy.deepcopy(model)
    fast.compile(backend="rana", options={"plan": plan, "mode": "max-autotune", "inductor": {"epilogue_fusion": False}})
    with torch.no_grad():
        logits(fast, 12)
    assert seen[0]["max_autotune"] is True and seen[0]["epilogue_fusion"] is False


def test_explain_looks_for_the_sites_of_the_plan(model: nn.Module) -> None:
    """With gate and up apart, and without an excluded linear that would be stacked with others."""
    plan = rana_compile.calibrate(model, tokens(4), 0.6, recipe="rana", exclude="k_proj", progress=False)
    told = rana_compile.explain(model, tokens(1)[0], options={"plan": plan}, use_cache=False)
    assert {o.site for o in told.sites} == {s.site for s in plan.sites}
    families = {s.site: s.family for s in plan.sites}
    assert all((o.action == "dense") == (families[o.site] == "dense") for o in told.sites)
    assert [(s.name, s.reason) for s in told.skipped if "k_proj" in s.name] == [
        ("model.layers.0.self_attn.k_proj.weight", "excluded by k_proj")
    ]


def test_explain_tells_what_and_why_without_compiling(model: nn.Module, plan: Plan) -> None:
    (ids,) = tokens(1, length=1)
    told = rana_compile.explain(model, ids, options={"plan": plan, "prefill": "dense"}, use_cache=False)
    assert told.graphs == 1 and sum(o.share for o in told.sites) == pytest.approx(1)
    assert all("masked kernels" in o.reason for o in told.sites if o.action == "adapted")
    longer = rana_compile.explain(model, tokens(1)[0], options={"plan": plan, "prefill": "dense"}, use_cache=False)
    assert {o.action for o in longer.sites} == {"dense"}
    text = str(rana_compile.explain(model, tokens(1)[0], options={"exclude": "lm_head"}))
    assert "model.layers.0.mlp.down_proj" in text and "8,192 tokens" in text and "excluded by lm_head" in text
    assert all(p.requires_grad for p in model.parameters())
