"""Prompts through the backend: how the parts of a stack are computed, and what their graphs are given."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import plan_of, tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import backend
from rana_compile.adapters import base
from rana_compile.adapters.base import batched, one_product
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.config import BackendOptions
from rana_compile.kernels import ops
from rana_compile.passes.names import source_name
from rana_compile.testing import count_compilations
from rana_compile.types import Site


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def test_parts_are_computed_in_the_form_measured_for_their_rows(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart where they vary: one graph serves any number of rows."""
    plan = rana_compile.calibrate(model, tokens(4), 0.6, recipe="neuron", progress=False)
    forms: set[str] = set()

    def of(rows: int | None, *_: Any) -> str:
        return "apart" if rows is None or rows > 30 else "together" if rows <= 20 else "batched"

    monkeypatch.setattr(base, "one_product", lambda *given: forms.add("together") or one_product(*given))
    monkeypatch.setattr(base, "batched", lambda *given: forms.add("batched") or batched(*given))
    monkeypatch.setattr(ops, "masked_is_faster", lambda *_: False)
    monkeypatch.setattr(ops, "stack_form", of)
    options = {"plan": plan, "compiler": "eager"}
    with torch.no_grad(), rana_compile.adapted(model, plan) as formulas:
        expected = {n: formulas(input_ids=tokens(1, length=n)[0], use_cache=False).logits for n in (12, 20, 21, 40)}

    def ran(fast: Any, length: int) -> str:
        forms.clear()
        with torch.no_grad():
            found = fast(input_ids=tokens(1, length=length)[0], use_cache=False).logits
        torch.testing.assert_close(found, expected[length], rtol=1e-4, atol=1e-4)
        return " and ".join(sorted(forms)) or "apart"

    fixed = torch.compile(model, backend="rana", dynamic=False, options=options)
    assert [ran(fixed, n) for n in (12, 20, 21, 40)] == ["together", "together", "batched", "apart"]
    torch.compiler.reset()
    symbolic = torch.compile(model, backend="rana", dynamic=True, options=options)
    with count_compilations() as counts:
        assert {ran(symbolic, n) for n in (12, 20, 21, 40, 12)} == {"apart"}
    assert counts.graphs == 1


@pytest.mark.parametrize(
    ("family", "copied", "form"), [("neuron", 0, "batched"), ("gated", 0, "apart"), ("gated", 384, "batched")]
)
def test_large_gates_are_not_copied_for_prompts_alone(
    family: str, copied: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "stack_form", lambda *_: "batched")
    monkeypatch.setattr(backend, "COPIED", copied)
    entry = SimpleNamespace(site=Site("", "gate_up", ("a", "b"), 8, (6, 6), activation="silu"), family=family)
    weights = [torch.zeros(6, 8), torch.zeros(6, 8)]
    node = SimpleNamespace(meta={"example_value": torch.zeros(1)})
    match = SimpleNamespace(rows=100, x=node, linears=[SimpleNamespace(node=node)])
    assert backend._stack_form(match, weights, entry, BackendOptions()) == form
    free = BackendOptions(free_dense_weights=True)
    assert backend._stack_form(match, weights, entry, free) == ("apart" if family == "gated" else form)


@pytest.mark.parametrize(
    ("form", "gone"),
    [
        ("apart", ()),
        ("batched", ("k_proj", "v_proj", "gate_proj", "up_proj")),
        ("together", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
    ],
)
def test_a_prompts_graph_has_one_input_for_what_was_fitted_and_none_that_nobody_reads(
    form: str, gone: tuple[str, ...], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = rana_compile.calibrate(model, tokens(4), 0.6, recipe="neuron", progress=False)
    compile_graph, graphs = backend._compile, []

    def compiler(gm: torch.fx.GraphModule, inputs: list[Any], *rest: Any) -> Any:
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        assert len(nodes) == len(inputs) and all(node.users for node in nodes)
        graphs.append(({source_name(node) for node in nodes}, dict(gm.named_buffers())))
        return compile_graph(gm, inputs, *rest)

    monkeypatch.setattr(backend, "_compile", compiler)
    monkeypatch.setattr(ops, "masked_is_faster", lambda *_: False)
    monkeypatch.setattr(ops, "stack_form", lambda _, d, d_outs, *__: form if len(d_outs) > 1 else "apart")
    fast = torch.compile(model, backend="rana", dynamic=False, options={"plan": plan, "compiler": "eager"})
    (ids,) = tokens(1)
    with torch.no_grad(), rana_compile.adapted(model, plan) as formulas:
        expected = formulas(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(fast(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    ((inputs, buffers),) = graphs
    stacks = [e.site.weights for e in plan.adapted if len(e.site.weights) > 1]
    weights = {name for e in plan.adapted for name in e.site.weights}
    assert weights - inputs == {name for name in weights if name.split(".")[-2] in gone}
    fitted = [name for name in buffers if name.startswith("rana_") and name.endswith("_fitted")]
    assert len(fitted) == len(plan.adapted) > 0
    assert len([n for n in buffers if n.startswith("rana_")]) - len(fitted) == (len(stacks) if form != "apart" else 0)


@pytest.mark.parametrize("form", ["apart", "batched", "together"])
@pytest.mark.parametrize("rows", [1, 50])
def test_autocast_that_begins_inside_of_the_graph_gives_its_dtype(
    rows: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(16, 24), nn.Linear(16, 24)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return self.q(x), self.k(x)

    module, x = Cast(), torch.randn(rows, 16)
    site = Site("q", "stacked", ("q.weight", "k.weight"), 16, (24, 24))
    plan = plan_of(module, (site, "neuron", neuron_tensors(torch.zeros(2, 16))))
    monkeypatch.setattr(ops, "masked_is_faster", lambda *_: True)
    monkeypatch.setattr(ops, "stack_form", lambda *_: form)
    with torch.no_grad():
        found = torch.compile(module, backend="rana", options={"plan": plan})(x)
        for y, expected in zip(found, module(x), strict=True):
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
