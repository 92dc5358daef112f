"""The Dynamo backend ``rana``: find the plan's sites in a graph, put adapters in, hand the rest to Inductor."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, fx

from rana_compile.binding import Bound, bind
from rana_compile.config import BackendOptions
from rana_compile.passes.find import bind_sites
from rana_compile.passes.match import Match
from rana_compile.passes.rewrite import Lowering, rewrite
from rana_compile.plan import Plan
from rana_compile.types import ConfigError

log = logging.getLogger(__name__)

DECODE_ROWS = 1  # graphs of this many rows or fewer are lowered to the masked kernels


def rana(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="rana", options={"plan": plan})``; options: ``config.BackendOptions``.

    Raises:
        ConfigError: an unknown or contradictory option.
        PlanError: the plan cannot be read or belongs to other weights.
    """
    parsed = BackendOptions.parse(options, mode)
    plan = load_plan(parsed.plan)
    adapted, refresh = adapt_graph(gm, example_inputs, plan, parsed.prefill, kernels=True)
    compiled = _inductor(adapted, example_inputs, parsed)
    return _refreshing(compiled, refresh) if refresh else compiled


def load_plan(plan: Any) -> Plan:
    """The plan itself, or the plan saved at a path (read once per path and modification)."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, str | PathLike):
        return Plan.load(plan)
    raise ConfigError(f"option 'plan' is a {type(plan).__name__}; expected a rana_compile.Plan or a path")


Refresh = list[tuple[Bound, tuple[int, ...]]]  # a bound site and the positions of its weights among the inputs


def adapt_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan, prefill: str, kernels: bool
) -> tuple[fx.GraphModule, Refresh]:
    """The graph with the plan's adapters, and what to check against its weights before each call."""
    position = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    entries = {s.site.weights: s for s in plan.sites}
    matches = bind_sites(gm, [s.site for s in plan.sites])
    lowerings: list[Lowering] = []
    refresh: Refresh = []
    for match in matches:
        entry = entries[match.site.weights]
        places = tuple(position[lin.weight] for lin in match.linears)
        weights = [example_inputs[i] for i in places]
        training = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
        decode = kernels and not training and _is_decode(match, weights)
        if decode:
            _load_kernels(weights[0].device.type)
        if entry.family == "dense":
            if decode:
                lowerings.append(Lowering(match, "dense", True, {}))
            continue
        if not decode and prefill == "dense" and match.rows != 1:
            continue
        bound = bind(plan, entry, weights)
        if training:
            lowerings.append(Lowering(match, entry.family, False, bound.stored))
            continue
        buffers = bound.packed(weights) if decode else bound.folded(weights)
        lowerings.append(Lowering(match, entry.family, decode, buffers))
        refresh.append((bound, places))
    log.info("adapted %d of %d sites in a graph of %d nodes", len(refresh), len(matches), len(gm.graph.nodes))
    return (rewrite(gm, lowerings) if lowerings else gm), refresh


def _is_decode(match: Match, weights: Sequence[Tensor]) -> bool:
    rows = match.rows
    same = {match.x.meta["example_value"].dtype, *(w.dtype for w in weights)}
    return rows is not None and rows <= DECODE_ROWS and len(same) == 1


def _load_kernels(device_type: str) -> None:
    from rana_compile.kernels import ops

    ops.load(device_type)


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions) -> Callable[..., Any]:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(options.mode)) if options.mode else {}
    patches |= dict(options.inductor or {})
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def _refreshing(compiled: Callable[..., Any], refresh: Refresh) -> Callable[..., Any]:
    """Packed copies follow the weights: checked before each call, rewritten in place if a weight changed."""

    def call(*args: Any) -> Any:
        for bound, places in refresh:
            bound.refresh([args[i] for i in places])
        return compiled(*args)

    call._boxed_call = False  # type: ignore[attr-defined]
    return call


@contextmanager
def adapted(model: torch.nn.Module, plan: Plan | str | PathLike[str]) -> Iterator[Callable[..., Any]]:
    """Yields the adapted model as a callable, run eagerly: masks on for every token, no kernels, no Inductor.

    For quality figures and for checking a compiled model against the plain formulas.
    """
    chosen = load_plan(plan)
    codes: set[Any] = set()

    def eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        context = torch._guards.TracingContext.try_get()
        codes.update(getattr(context, "traced_code", None) or ())
        return adapt_graph(gm, example_inputs, chosen, "adapted", kernels=False)[0]

    try:
        yield torch.compile(model, backend=eager)
    finally:
        for code in codes:
            torch._dynamo.reset_code(code)
