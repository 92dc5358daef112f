"""The backend as a user meets it: by name, with a plan, in generation, in evaluation and in training."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import OLD_DYNAMO, plan_of, tiny_llama, tokens
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import rana_compile
from rana_compile import Plan
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.backend import is_left_dense
from rana_compile.config import BackendOptions
from rana_compile.kernels import ops
from rana_compile.types import PlanError, Site


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return rana_compile.calibrate(model, tokens(8), flops_budget=0.6, progress=False)


@pytest.fixture(scope="module")
def rank_plan(model: nn.Module) -> Plan:
    """Every site a rank or a low-rank adapter."""
    sites = [entry.site for entry in rana_compile.calibrate(model, tokens(4), 1.0, progress=False).sites]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    entries = []
    for i, site in enumerate(sites):
        weight = torch.cat([parameters[name].detach() for name in site.weights])
        basis = torch.linalg.svd(weight, full_matrices=False)[0][:, :40].contiguous()
        if i % 2:
            entries.append((site, "low_rank", {"output_basis": basis}))
        else:
            entries.append((site, "rank", {"output_basis": basis, "threshold": torch.full((40,), 0.2)}))
    return plan_of(model, *entries)


def compiled(model: nn.Module, plan: Plan | Path, **options: object) -> nn.Module:
    other = copy.deepcopy(model)
    other.compile(backend="rana", options={"plan": plan, **options})
    return other


def generated_eagerly(model: nn.Module, plan: Plan, prompt: Tensor, count: int) -> Tensor:
    """Greedy tokens of the plain formulas, no cache."""
    ids = prompt
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, run(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def generate(model: nn.Module, prompt: Tensor, count: int, cache: str | None) -> Tensor:
    mask = torch.ones_like(prompt)
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, cache_implementation=cache, pad_token_id=0
    )


@pytest.mark.parametrize("which", ["plan", "rank_plan"])
def test_forward_equals_the_formulas(model: nn.Module, which: str, request: pytest.FixtureRequest) -> None:
    plan = request.getfixturevalue(which)
    (ids,) = tokens(1, seed=3)
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        expected = run(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, plan)(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        dense = model(input_ids=ids).logits
    assert (expected - dense).abs().max() > 0.01  # the masks do something


@pytest.mark.parametrize("cache", ["static", None], ids=["static", "dynamic"])
@pytest.mark.parametrize("which", ["plan", "rank_plan"])
def test_generate(model: nn.Module, which: str, cache: str | None, request: pytest.FixtureRequest) -> None:
    if OLD_DYNAMO and cache is None:
        pytest.skip(
            "Inductor of torch 2.11 writes C++ for a growing cache that no compiler takes, of the dense model too"
        )
    plan = request.getfixturevalue(which)
    prompt = tokens(1, length=7, seed=4)[0]
    expected = generated_eagerly(model, plan, prompt, 12)
    fast = compiled(model, plan)
    for _ in range(2):  # some versions of transformers call the model in another way the second time
        assert torch.equal(generate(fast, prompt, 12, cache), expected)
    frames = counters["stats"]["unique_graphs"]
    assert torch.equal(generate(fast, prompt, 12, cache), expected)
    assert counters["stats"]["unique_graphs"] == frames


def test_full_budget_decodes_as_dense(model: nn.Module) -> None:
    plan = rana_compile.calibrate(model, tokens(4), flops_budget=1.0, progress=False)
    (ids,) = tokens(1, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(model, plan)(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-4
        )
        one = ids[:, :1]
        torch.testing.assert_close(
            compiled(model, plan)(input_ids=one).logits, model(input_ids=one).logits, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny_llama(layers=1).to(dtype)
    plan = rana_compile.calibrate(model, tokens(4), flops_budget=0.7, progress=False)
    one = tokens(1, length=1)[0]
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        expected = run(input_ids=one).logits
        difference = compiled(model, plan)(input_ids=one).logits.float() - expected.float()
    assert difference.norm() < 0.05 * expected.float().norm()  # a coordinate at its threshold may fall either way


def test_dense_prefill_leaves_longer_inputs_dense(model: nn.Module, plan: Plan) -> None:
    (ids,) = tokens(1, seed=3)
    fast = compiled(model, plan, prefill="dense")
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        one = fast(input_ids=ids[:, :1]).logits
    with rana_compile.adapted(model, plan) as run:
        torch.testing.assert_close(one, run(input_ids=ids[:, :1]).logits.detach(), rtol=1e-4, atol=1e-4)


def test_dense_prefill_keeps_the_rows_of_a_batch_in_decode() -> None:
    options = BackendOptions.parse({"plan": "p", "prefill": "dense"}, None)

    def is_dense(rows: int | None, decode: bool) -> bool:
        return is_left_dense(SimpleNamespace(rows=rows), options, decode)

    assert not is_dense(1, False) and not is_dense(1, True) and not is_dense(16, True)
    assert is_dense(16, False) and is_dense(17, True) and is_dense(None, True) and is_dense(None, False)
    usual = BackendOptions.parse({"plan": "p"}, None)
    assert not is_left_dense(SimpleNamespace(rows=17), usual, True)


def test_kernels_take_a_number_of_rows_that_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def faster(rows: int | None, *_: object) -> bool:
        asked.append(rows)
        return True

    monkeypatch.setattr(ops, "masked_is_faster", faster)
    linear = nn.Linear(48, 40)
    threshold = torch.full((1, 48), 0.5)
    site = Site("", "linear", ("weight",), 48, (40,))
    plan = plan_of(linear, (site, "neuron", neuron_tensors(threshold)))
    fast = torch.compile(linear, backend="rana", dynamic=True, options={"plan": plan})
    with torch.no_grad():
        for rows in (3, 40, 17, 300):
            x = torch.randn(rows, 48)
            torch.testing.assert_close(fast(x), linear(x * (x.abs() >= 0.5)), rtol=1e-4, atol=1e-5)
    assert asked == [None]


class GateUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(48, 40, bias=False), nn.Linear(48, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize(("rows", "dynamic"), [(3, False), (40, True)])
def test_kernels_take_several_rows_of_a_gated_site(rows: int, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def faster(*of: object) -> bool:
        asked.append(of[:4])
        return True

    monkeypatch.setattr(ops, "gated_is_faster", faster)
    module = GateUp()
    site = Site("gate", "gate_up", ("gate.weight", "up.weight"), 48, (40, 40), activation="silu")
    level = {"threshold": torch.full((1, 48), 0.5), "gate_threshold": torch.full((40,), 0.1)}
    plan = plan_of(module, (site, "gated", level | {"probe": torch.zeros(0, 49)}))
    plan = replace(plan, sites=(replace(plan.sites[0], live=(12.0, 20.0)),))  # inputs, outputs
    x = torch.randn(rows, 48)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        y = torch.compile(module, backend="rana", dynamic=dynamic, options={"plan": plan})(x)
        gate = F.silu(module.gate(x * (x.abs() >= 0.5)))
        torch.testing.assert_close(y, gate * module.up(x) * (gate.abs() >= 0.1), rtol=1e-4, atol=1e-5)
    assert asked == [(None if dynamic else rows, 48, 40, 12 / 48)]
    assert "rana::gated_up" in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_pass_through_frozen_weights(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "masked_is_faster", lambda *_: True)
    linear = nn.Linear(48, 40).requires_grad_(False)
    site = Site("", "linear", ("weight",), 48, (40,))
    plan = plan_of(linear, (site, "neuron", neuron_tensors(torch.full((1, 48), 0.5))))
    fast = torch.compile(linear, backend="rana", dynamic=dynamic, options={"plan": plan})
    x = torch.randn(20, 48, requires_grad=True)
    fast(x).sum().backward()
    expected = linear.weight.sum(0) * (x.abs() >= 0.5)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_plan_by_path_and_wrapper(model: nn.Module, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.safetensors")
    (ids,) = tokens(1)
    wrapped = torch.compile(model, backend="rana", options={"plan": str(tmp_path / "plan.safetensors")})
    with torch.no_grad():
        by_path = wrapped(input_ids=ids).logits
        by_value = compiled(model, plan)(input_ids=ids).logits
    torch.testing.assert_close(by_path, by_value)


class Counting(nn.Module):
    """A linear, and how often it ran, unless it is not to write."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.linear, self.writes = nn.Linear(32, 48, bias=False), writes
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.runs.add_(1)
        return self.linear(x)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("rows", [1, 50])
def test_weights_changed_in_place_are_followed(rows: int, writes: bool) -> None:
    """Packed copies never answer for weights that are gone, and nothing that writes runs twice."""
    module = Counting(writes)
    site = Site("linear", "linear", ("linear.weight",), 32, (48,))
    plan = plan_of(module, (site, "neuron", neuron_tensors(torch.full((1, 32), 0.3))))
    fast = torch.compile(module, backend="rana", options={"plan": plan})
    x, weight = torch.randn(rows, 32), module.linear.weight
    kept = x * (x.abs() >= 0.3)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), kept @ weight.t())
        weight.mul_(1.1)
        torch.testing.assert_close(fast(x), kept @ weight.t())
        weight.mul_(1.1)
        torch.testing.assert_close(fast(x), kept @ weight.t())
        torch.testing.assert_close(fast(x), kept @ weight.t())
        assert module.runs == (4 if writes else 0)
        weight.copy_(torch.randn(48, 32))
        with pytest.raises(PlanError, match="overwritten"):
            fast(x)


def test_training_changes_the_users_weights_with_the_formulas_gradient() -> None:
    layer = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 8))
    basis = torch.linalg.svd(layer[0].weight.detach(), full_matrices=False)[0][:, :12].contiguous()
    plan = plan_of(
        layer,
        (
            Site("0", "linear", ("0.weight",), 32, (24,)),
            "rank",
            {"output_basis": basis, "threshold": torch.full((12,), 0.3)},
        ),
        (Site("2", "linear", ("2.weight",), 24, (8,)), "neuron", neuron_tensors(torch.full((1, 24), 0.1))),
    )
    x = torch.randn(10, 32)

    def formula(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        z = x @ (basis.t() @ a).t()
        hidden = torch.tanh((z * (z.abs() >= 0.3)) @ basis.t() + b)
        return (hidden * (hidden.abs() >= 0.1)) @ c.t() + d

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    formula(*parameters).square().sum().backward()
    names = list(layer.state_dict())
    fast = torch.compile(layer, backend="rana", options={"plan": plan})
    fast(x).square().sum().backward()
    for p, expected in zip(layer.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert list(layer.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "nowhere.safetensors"}, "no plan at 'nowhere.safetensors'"),
        ({"plan": 7}, "the plan is a int"),
        ({"plan": "p", "budget": 0.5}, "unknown option 'budget'; known options: plan, prefill, include"),
    ],
)
def test_bad_options_are_errors(options: dict, message: str) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(Exception, match=message):
        torch.compile(layer, backend="rana", options=options)(torch.randn(1, 4))


def test_foreign_weights_are_an_error(model: nn.Module, plan: Plan) -> None:
    torch.manual_seed(1)
    other = tiny_llama()
    other.compile(backend="rana", options={"plan": plan})
    with pytest.raises(Exception, match="the weights are not those the plan was fitted on"), torch.no_grad():
        other(input_ids=tokens(1)[0])


def test_calibration_leaves_no_memory_of_sizes_in_dynamo(model: nn.Module) -> None:
    """A compile after calibration is as it would have been without: sizes static at first."""
    rana_compile.calibrate(model, tokens(4), progress=False)
    sizes: list[object] = []

    def spy(gm: torch.fx.GraphModule, example_inputs: list[object]) -> object:
        sizes.extend(v.shape for v in example_inputs if isinstance(v, Tensor) and not isinstance(v, nn.Parameter))
        return gm

    with torch.no_grad():
        torch.compile(model, backend=spy)(input_ids=tokens(1, length=9)[0])
    assert all(isinstance(n, int) for shape in sizes for n in shape)
