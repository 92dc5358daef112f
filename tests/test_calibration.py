"""From batches to a plan, on tiny models: budgets met, seeds repeated, the model left as it was."""

from collections.abc import Sequence

import pytest
import torch
from support import VOCABULARY, tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import ConfigError, Plan, RanaError
from rana_compile.calibration import Target, calibration
from rana_compile.fitting import Candidate, Evidence, dense_candidate
from rana_compile.recipes import best_rank
from rana_compile.text import sample_windows
from rana_compile.types import Site


def calibrate(model: nn.Module, *args: object, **kwargs: object) -> Plan:
    return rana_compile.calibrate(model, *(args or (tokens(8),)), progress=False, **kwargs)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def test_full_budget_is_the_dense_model(model: nn.Module) -> None:
    plan = calibrate(model, flops_budget=1.0)
    (ids,) = tokens(1, seed=5)
    with rana_compile.adapted(model, plan) as run:
        assert torch.equal(run(input_ids=ids).logits, model(input_ids=ids).logits)
    assert plan.flops_kept == 1.0


@pytest.mark.parametrize("recipe", ["neuron", "auto"])
def test_realised_cost_is_the_asked_one(model: nn.Module, recipe: str) -> None:
    plan = calibrate(model, flops_budget=0.6, recipe=recipe)
    assert plan.flops_kept == pytest.approx(0.6, rel=0.01)
    assert len(plan.sites) == 9
    other = rana_compile.measure_cost(model, plan, tokens(8, seed=7))
    assert other == pytest.approx(0.6, rel=0.04)  # tokens drawn at random: 256 of them
    assert 0 < plan.info["divergence"] < 5


def test_papers_recipe(model: nn.Module) -> None:
    """Rank adapters for stacked inputs, gate and up; neuron for down; o_proj and lm_head dense; cost as asked."""
    model = tiny_llama(hidden_size=64, intermediate_size=256, num_key_value_heads=4)
    plan = calibrate(model, flops_budget=0.8, recipe="rana")
    families = {s.site.name.rpartition(".")[2]: s.family for s in plan.sites}
    assert (families["o_proj"], families["lm_head"], families["{q,k,v}_proj"]) == ("dense", "dense", "rank")
    assert "rank" in (families["gate_proj"], families["up_proj"])  # a split may leave one of them dense
    assert set(families) == {"{q,k,v}_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert plan.flops_kept == pytest.approx(0.8, rel=0.02)


def test_papers_recipe_says_when_a_budget_is_out_of_its_reach(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match='use recipe="auto"'):
        calibrate(model, flops_budget=0.3, recipe="rana")
    with pytest.raises(ConfigError, match=r"keeps \d+\.\d% of the included FLOPs dense"):
        calibrate(model, flops_budget=0.1, recipe="rana")


def test_a_group_without_processes(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="call init_process_group first"):
        rana_compile.calibrate(model, tokens(4), 0.6, group=object(), progress=False)


def test_a_model_that_returns_no_tensor() -> None:
    class Named(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": super().forward(x)}

    with pytest.raises(ConfigError, match="returned a dict; expected logits, a hidden state or a tensor"):
        rana_compile.calibrate(Named(64, 64), [{"x": torch.randn(8, 64)} for _ in range(4)], 0.6, progress=False)


def test_too_little_text_for_the_windows_asked_for() -> None:
    with pytest.raises(ConfigError, match="has 2 windows of 4 tokens; 9 were asked for"):
        sample_windows(lambda text, **settings: {"input_ids": [1, 2, 3]}, ["a", "b", "c"], 4, 9)


def test_include_and_exclude(model: nn.Module) -> None:
    plan = calibrate(model, include="mlp", exclude=["layers.1"])
    assert [s.site.name for s in plan.sites] == ["model.layers.0.mlp.{gate,up}_proj", "model.layers.0.mlp.down_proj"]
    reasons = {s.name: s.reason for s in plan.skipped}
    assert reasons["lm_head.weight"] == "not included by mlp"
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "excluded by layers.1"
    linears = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert plan.model_flops == linears
    assert plan.flops_kept_model > 0.8 > plan.flops_kept


def test_same_seed_same_plan(model: nn.Module) -> None:
    a, b = calibrate(model, seed=3), calibrate(model, seed=3)
    for x, y in zip(a.sites, b.sites, strict=True):
        assert (x.family, x.live, x.error) == (y.family, y.live, y.error)
        assert all(torch.equal(x.tensors[k], y.tensors[k]) for k in x.tensors)


def test_what_was_recorded_goes_after_the_last_fit_and_comes_back_for_another(model: nn.Module) -> None:
    with calibration(model, tokens(6), progress=False, fits=2) as session:
        target = Target("flops", 0.6)
        plans = [session.fit(target)]
        assert session._recorder is not None
        plans.append(session.fit(target))
        assert session._recorder is None
        plans.append(session.fit(target))
    assert len({plan.digest() for plan in plans}) == 1


def test_second_moments_are_kept_where_they_are_read(model: nn.Module) -> None:
    """They take 4 d_in² bytes a site; a session that goes on with a recipe that reads all records anew."""
    plans = []
    with calibration(model, tokens(6), progress=False, fits=4) as session:
        for recipe, of_down in (("auto", False), (best_everywhere, True), ("auto", True)):
            plans.append(session.fit(Target("flops", 0.6), recipe))
            kept = {site.kind for site in session._recorder.moments}
            assert "gate_up" in kept and ("down" in kept) == of_down
    assert plans[0].digest() == plans[2].digest()
    assert plans[1].digest() == rana_compile.calibrate(model, tokens(6), 0.6, best_everywhere, progress=False).digest()


def best_everywhere(evidence: Sequence[Evidence], mlps: object, share: float) -> dict[Site, Candidate]:
    return {e.site: best_rank(e, 0.9) if e.site.d_out >= e.site.d_in else dense_candidate(e) for e in evidence}


def test_an_output_cut_off_from_its_layers_is_an_error() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_llama(layers=1)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids).logits.detach()

    with pytest.raises(RanaError, match="no gradient leads from the model's output"):
        calibrate(Cut())


def test_model_is_left_as_it_was() -> None:
    model = tiny_llama(layers=1).train()
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_interrupted_calibration_leaves_the_model_as_it_was() -> None:
    model = tiny_llama(layers=1).train()

    class Interrupted(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model.lm_head, head = Interrupted(), model.lm_head
    with pytest.raises(KeyboardInterrupt):
        calibrate(model)
    model.lm_head = head
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_budget": 0}, r"flops_budget is 0; expected a share in \(0, 1\]"),
        ({"flops_budget": 1.2}, "flops_budget is 1.2"),
        ({"flops_budget": float("nan")}, "flops_budget is nan"),
        ({"flops_budget": -0.5}, "flops_budget is -0.5"),
        ({"flops_budget": "half"}, "flops_budget is 'half'"),
        ({"flops_budget": 0.01}, r"a budget of 1.0% cannot be reached: the cheapest adapters keep 1\d\.\d% of what"),
        ({"bytes_budget": 0.01}, r"a budget of 1.0% cannot be reached: the cheapest adapters keep \d+\.\d% of what"),
        ({"recipe": 3}, "unknown recipe 3; known recipes: .*, or a callable"),
        ({"recipe": "best"}, "known recipes: auto, neuron, rana"),
        ({"exclude": ["lm_heat"]}, "exclude='lm_heat' matches no parameter"),
    ],
)
def test_bad_arguments(model: nn.Module, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(model, **changes)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least 2 batches"),
        (torch.zeros(2, 8, dtype=torch.long), "expected an iterable"),
        ([torch.rand(1, 8)] * 4, "expected integer token ids"),
        ([torch.zeros(8, dtype=torch.long)] * 4, r"shape \(8,\)"),
        ([torch.zeros(1, 0, dtype=torch.long)] * 4, "batch 0 is empty"),
        ([torch.full((1, 8), VOCABULARY)] * 4, "batch 0 holds token id 128"),
        ([torch.full((1, 8), -1)] * 4, "batch 0 holds token id -1; this model's vocabulary is 0 to 127"),
        (tokens(3, length=10), "holds 30 tokens; thresholds need at least 32"),
        ([{"input_ids": [1, 2, 3]}, {"input_ids": [[1, 2], [3]]}], "batch 1 holds no tensor"),
    ],
)
def test_bad_data(model: nn.Module, batches: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(model, batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_named_before_anything_runs(value: float) -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = value
    model.forward = None  # type: ignore[assignment]  # it is not called
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        calibrate(model)


def test_a_mask_of_minus_infinity_may_be_a_parameter() -> None:
    model = tiny_llama(layers=1)
    model.mask = nn.Parameter(torch.full((8,), -torch.inf))
    assert calibrate(model, flops_budget=0.7, recipe="neuron").adapted


def test_broken_activations_are_named() -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(RanaError, match=r"mlp\.down_proj: its input holds NaN"):
        calibrate(model)


@pytest.mark.parametrize("size", [1e38, -1e38])
def test_a_broken_output_is_named(size: float) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        model[2].weight.fill_(size)
    with pytest.raises(RanaError, match=r"output holds NaN or infinity on calibration data; .*wider dtype"):
        calibrate(model, [{"input": 100 * torch.rand(64, 16)} for _ in range(4)])


def test_too_few_rows_of_any_kind_are_named() -> None:
    """Pictures have no tokens to count; what a linear sees of them does."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32))
    with pytest.raises(ConfigError, match="holds 9 tokens; thresholds need at least 32"):
        calibrate(model, [{"input": torch.rand(3, 3, 4, 4)} for _ in range(4)])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64])
def test_weights_of_other_dtypes_are_listed_with_the_reason(dtype: torch.dtype) -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(32, 32)
            stored = torch.randn(32, 32).to(dtype)
            self.weight = nn.Parameter(stored, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.plain(x)
            if self.weight.is_complex():
                return nn.functional.linear(x.to(self.weight.dtype), self.weight).real
            return nn.functional.linear(x, self.weight.to(x.dtype))

    plan = calibrate(Stored(), [{"x": torch.randn(64, 32)} for _ in range(4)], flops_budget=0.7)
    assert [s.site.name for s in plan.sites] == ["plain"]
    assert plan.skipped and all(s.reason for s in plan.skipped)


def test_double_precision_is_adapted() -> None:
    model = tiny_llama(layers=1).double()
    plan = calibrate(model, flops_budget=0.7, recipe="neuron")
    assert plan.info["dtype"] == ["torch.float64"]
    ids = tokens(1)[0]
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        expected = run(input_ids=ids[:, :1]).logits
    model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids[:, :1]).logits, expected)


def test_model_without_linears() -> None:
    with pytest.raises(RanaError, match="no linear layer of the model can be adapted"):
        calibrate(nn.Embedding(VOCABULARY, 4), [{"input": t} for t in tokens(4)])


def test_model_without_logits() -> None:
    """Any tensor in, any tensor out: the price is then a scaled squared error through the rest of the model."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    plan = calibrate(model, [{"input": torch.randn(64, 16)} for _ in range(8)], flops_budget=0.7)
    assert plan.flops_kept == pytest.approx(0.7, rel=0.02)


def test_batch_of_rows_and_dataset_rows(model: nn.Module) -> None:
    ids = torch.cat(tokens(6))
    one = calibrate(model, [ids])
    rows = calibrate(model, [{"input_ids": row.tolist()} for row in ids])
    assert one.flops_kept == rows.flops_kept


def test_a_compiled_model_is_calibrated_and_measured_as_it_was_before() -> None:
    model, ids = tiny_llama(), tokens(4)
    plan = rana_compile.calibrate(model, ids, 0.6, "neuron", progress=False)
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        expected = run(input_ids=ids[0]).logits
    model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
    with torch.no_grad():
        compiled = model(input_ids=ids[0]).logits
    again = rana_compile.calibrate(model, ids, 0.6, "neuron", progress=False)
    assert [s.live for s in again.sites] == [s.live for s in plan.sites]
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        assert torch.equal(run(input_ids=ids[0]).logits, expected)
        dense = model(input_ids=ids[0]).logits
    assert not torch.allclose(dense, compiled, atol=1e-3)  # inside, the model itself is dense
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[0]).logits, compiled)  # and compiled again afterwards


def test_a_layer_whose_weights_are_yet_to_come_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"0\.weight has no values"):
        rana_compile.calibrate(nn.Sequential(nn.LazyLinear(64)), [{"input": torch.randn(64, 64)}] * 4, 0.6)
