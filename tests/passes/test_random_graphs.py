"""Random graphs, rewritten and run, compute the adapters' formulas: linears, stacks, MLPs and what lies between."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import formula, graph_and_inputs, plan_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.backend import adapt_graph
from rana_compile.config import BackendOptions
from rana_compile.passes.find import find_sites
from rana_compile.passes.match import Found
from rana_compile.plan import Plan
from rana_compile.types import Site

WIDTHS = (4, 7, 12)
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(-1),
    "written out": lambda x: x * 0.5 + x.abs(),
    "turned": lambda x: x.flip(-1).contiguous(),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,  # none that the kernels know
}
MARGIN = 1e-4  # a coordinate so near to its threshold may fall either way in float32


@dataclass(frozen=True)
class Step:
    """One thing a random model does with an earlier value: what, where from, and how."""

    kind: str
    source: int
    choice: int
    width: int
    bias: bool


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(["linear", "stack", "gated", "mlp", "between", "add", "product"]),
        st.integers(0, 9),
        st.integers(0, 9),
        st.sampled_from(WIDTHS),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
HIDDEN = 9


class RandomModel(nn.Module):
    """Runs the steps; each may use any value made before, so inputs are shared and values are used again."""

    def __init__(self, steps: Sequence[Step], width: int) -> None:
        super().__init__()
        self.steps = list(steps)
        self.layers = nn.ModuleDict()
        self.factors = nn.ParameterDict()
        widths = [width]
        for i, step in enumerate(steps):
            d = widths[step.source % len(widths)]
            shapes = {
                "linear": [(d, step.width)],
                "stack": [(d, step.width)] * (2 + step.choice % 2),
                "gated": [(d, HIDDEN), (d, HIDDEN), (HIDDEN, step.width)],
                "mlp": [(d, HIDDEN), (HIDDEN, step.width)],
            }.get(step.kind, [])
            for j, (d_in, d_out) in enumerate(shapes):
                self.layers[f"{i}_{j}"] = nn.Linear(d_in, d_out, bias=step.bias and j != 1)
            if step.kind == "product":
                self.factors[str(i)] = nn.Parameter(torch.randn(d, step.width))
            widths += [step.width if shapes or step.kind == "product" else d]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for i, step in enumerate(self.steps):
            values.append(self.step(i, step, values[step.source % len(values)], values))
        return tuple(values[1:])

    def step(self, i: int, step: Step, x: Tensor, values: Sequence[Tensor]) -> Tensor:
        at = [self.layers[f"{i}_{j}"] for j in range(3) if f"{i}_{j}" in self.layers]
        act = list(ACTIVATIONS.values())[step.choice % len(ACTIVATIONS)]
        if step.kind == "stack":
            return sum((layer(x).tanh() for layer in at[1:]), at[0](x))
        if step.kind == "gated":
            return at[2](act(at[0](x)) * at[1](x))
        if step.kind == "mlp":
            return at[1](act(at[0](x)))
        if step.kind == "add":
            return next((x + v for v in reversed(values) if v is not x and v.shape == x.shape), x + 1)
        if step.kind == "product":
            return x @ self.factors[str(i)]
        return at[0](x) if step.kind == "linear" else list(BETWEEN.values())[step.choice % len(BETWEEN)](x)


def tensors_for(family: str, site: Site, weights: Sequence[Tensor], generator: torch.Generator) -> Tensors:
    """Any fitted tensors; thresholds that keep some coordinates and drop some."""

    def level(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.8)

    if family == "neuron":
        probed = bool(torch.rand((), generator=generator) < 0.5)
        made = neuron_tensors(level(len(weights), site.d_in))
        return made | {"probe": torch.randn(len(weights), site.d_in + 1, generator=generator) / 9} if probed else made
    if family == "gated":
        return neuron_tensors(level(1, site.d_in)) | {"gate_threshold": level(site.d_outs[0]) / 4}
    basis = torch.linalg.svd(torch.cat(list(weights)).detach(), full_matrices=False)[0][:, :5].contiguous()
    made = {"output_basis": basis, "threshold": level(basis.shape[1])}
    return {name: made[name] for name in FAMILIES[family].stored}


def random_plan(model: nn.Module, found: Found, generator: torch.Generator) -> Plan:
    parameters = dict(model.named_parameters())
    entries = []
    for match in found.matches:
        site = match.site
        possible = [name for name in FAMILIES if name != "gated" or (site.kind == "gate_up" and site.activation)]
        family = ([*possible, "dense"])[int(torch.randint(len(possible) + 1, (), generator=generator))]
        weights = site.oriented([parameters[name] for name in site.weights])
        entries.append((site, family, {} if family == "dense" else tensors_for(family, site, weights, generator)))
    return plan_of(model, *entries)


class Formulas(TorchFunctionMode):
    """Products with the plan's weights are the adapters' formulas in float64; how near a threshold one came is kept."""

    def __init__(self, plan: Plan, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.margins: list[float] = [1.0]
        self._parameters = parameters
        self._uses = {id(parameters[name]): (s, i) for s in plan.sites for i, name in enumerate(s.site.weights)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        weight = args[1] if func in (F.linear, Tensor.matmul, Tensor.__matmul__) else None
        if weight is None or id(weight) not in self._uses:
            return func(*args, **(kwargs or {}))
        entry, index = self._uses[id(weight)]
        names = entry.site.weights
        weights = entry.site.oriented([self._parameters[name] for name in names])
        biases = [self._parameters.get(name.removesuffix("weight") + "bias") for name in names]
        y = formula(entry.family, entry.site, args[0], weights, biases, entry.tensors, self.margins)
        return y.split(list(entry.site.d_outs), -1)[index]


@settings(max_examples=40)
@given(STEPS, st.integers(1, 3), st.sampled_from(WIDTHS), st.integers(0, 1 << 30))
def test_rewritten_graphs_compute_the_formulas(steps: list[Step], rows: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, x = RandomModel(steps, width), torch.randn(rows, width)
    torch._dynamo.reset()
    gm, inputs = graph_and_inputs(model, x)
    found = find_sites(gm)
    assume(found.matches)
    plan = random_plan(model, found, generator)
    with torch.no_grad():
        rewritten, _ = adapt_graph(gm, inputs, plan, BackendOptions.parse({"plan": plan}))
        got = rewritten(*inputs)
        double = copy.deepcopy(model).double()
        with Formulas(plan, dict(double.named_parameters())) as formulas:
            expected = double(x.double())
    assume(min(formulas.margins) > MARGIN)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
