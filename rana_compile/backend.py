"""The Dynamo backend ``rana``: find the plan's sites in a graph, put adapters in, hand the rest to Inductor."""

import logging
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend

from rana_compile.binding import Bound, Stamp, bind, stamp
from rana_compile.config import BackendOptions
from rana_compile.kernels import ops
from rana_compile.passes.attend import lower_single_queries, share_repeated_heads
from rana_compile.passes.causal import lower_causal_masks
from rana_compile.passes.causal_blocks import split_causal_attention
from rana_compile.passes.expand import expand
from rana_compile.passes.find import bind_sites
from rana_compile.passes.fuse import fuse_gated_mlps
from rana_compile.passes.masks import share_masks
from rana_compile.passes.match import Found, Match
from rana_compile.passes.rewrite import Lowering, copy_dynamo_graph, drop_unused, rewrite
from rana_compile.passes.sinusoids import share_sinusoids
from rana_compile.plan import Plan, SitePlan, weight_hash
from rana_compile.profiled import profiled
from rana_compile.room import with_room
from rana_compile.types import parameter_filter
from rana_compile.wrapped_generate import follow_generate

log = logging.getLogger(__name__)


def rana(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="rana")``; options: ``config.BackendOptions``.

    With a plan, graphs are adapted at once; without, the backend calibrates itself on the first calls' inputs
    (``self_calibration``).

    Raises:
        ConfigError: an unknown or contradictory option.
        PlanError: the plan cannot be read or belongs to other weights.
    """
    parsed = BackendOptions.parse(options, mode)
    gm = expand(gm)

    def compile_graph(inputs: Sequence[Any], plan: Plan | None) -> Callable[..., Any]:
        if plan is None:
            return _compile(copy_dynamo_graph(gm)[0], inputs, parsed)  # compilers change what they get
        adapted, refresh = adapt_graph(gm, inputs, plan, parsed)
        guarded = are_guarded(inputs, parsed)
        size = len(adapted.graph.nodes)  # before compilers change it
        left = drop_unused(adapted, {i for _, places in refresh for i in places})
        compiled = _compile(adapted, [inputs[i] for i in left], parsed, guarded)
        if not refresh:
            return compiled
        call = _refreshing(compiled, refresh, _choice(left, len(inputs)), parsed.free_dense_weights)
        return with_room(call) if size > ROOMY else call

    if parsed.plan is None:
        return profiled(gm, example_inputs, parsed, compile_graph)
    plan = Plan.of(parsed.plan)
    matches = tuple(bind_sites(gm, [entry.site for entry in _chosen(plan, parsed)]))
    return profiled(gm, example_inputs, parsed, compile_graph, (plan, Found(matches, (), ())))


ROOMY = 250  # nodes of a graph, beyond which it calls so much that room on the stack costs it little
COPIED = 2**23  # bytes of a gated site's weights that are copied for its prompts alone
_STACKED = {"together": "weight_t", "batched": "batched_weight_t"}  # what the families know the weights by
Refresh = list[tuple[Bound, tuple[int, ...]]]  # a bound site and the positions of its weights among the inputs


def adapt_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan, options: BackendOptions
) -> tuple[fx.GraphModule, Refresh]:
    """The graph with the plan's adapters, and what to check against its weights before each call."""
    position = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    entries = {s.site.weights: s for s in _chosen(plan, options)}
    matches = _unambiguous(bind_sites(gm, [s.site for s in entries.values()]), entries, position, example_inputs)
    lowerings: list[Lowering] = []
    refresh: Refresh = []
    for match in matches:
        entry = entries[match.site.weights]
        places = tuple(position[lin.weight] for lin in match.linears)
        weights = [example_inputs[i] for i in places]
        traced = match.x.meta["example_value"]
        training = torch.is_grad_enabled() and any(t.requires_grad for t in (traced, *weights))
        autocast = torch.is_autocast_enabled(weights[0].device.type)
        decode = not training and not autocast and is_decode(match, weights, entry)
        if is_left_dense(match, options, decode):
            continue
        if decode:
            ops.load(weights[0].device.type)
        if entry.family == "dense":
            if decode and all(w.is_contiguous() for w in match.site.oriented(weights)):
                lowerings.append(Lowering(match, "dense", True, {}))
            continue
        bound = bind(plan, entry, weights, options.check_weights)
        if training:
            lowerings.append(Lowering(match, entry.family, False, bound.stored))
            continue
        form = "apart" if decode else _stack_form(match, weights, entry, options)
        buffers = bound.packed(weights) if decode else bound.folded(weights)
        if form != "apart":
            buffers = buffers | {_STACKED[form]: bound.stacked(weights)}
        lowerings.append(Lowering(match, entry.family, decode, buffers, None if decode else bound.fitted))
        refresh.append((bound, places))
    masked = sum(low.decode and low.family != "dense" for low in lowerings)
    changed = sum(low.family != "dense" for low in lowerings)
    told = "adapted %d of %d sites in a graph: %d through masked kernels, %d in the plain masked form"
    log.info(told, changed, len(matches), masked, changed - masked)
    adapted = rewrite(gm, fuse_gated_mlps(lowerings)) if lowerings else copy_dynamo_graph(gm)[0]
    inference = bool(lowerings) and not torch.is_grad_enabled()
    _lower_attention(adapted, inference, inference and options.compiler == "inductor")
    _trace(adapted)
    return adapted, refresh


def _lower_attention(adapted: fx.GraphModule, inference: bool, inductor: bool) -> None:
    """What needs no adapter, in place: attention as it is faster, and once what all layers share."""
    if inductor:
        lower_single_queries(adapted)
        share_sinusoids(adapted)
    lower_causal_masks(adapted)
    if inductor:
        split_causal_attention(adapted)
    if inference:
        share_repeated_heads(adapted)
        share_masks(adapted)


def _trace(gm: fx.GraphModule) -> None:
    """For TORCH_TRACE, beside the graphs that Dynamo and Inductor leave there."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "rana_adapted_graph", "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )


def _unambiguous(
    matches: Sequence[Match],
    entries: Mapping[tuple[str, ...], SitePlan],
    position: Mapping[fx.Node, int],
    example_inputs: Sequence[Any],
) -> list[Match]:
    """One match per linear. In a part of a model names are short and fit several layers: the weights decide."""
    by_nodes: dict[tuple[fx.Node, ...], list[Match]] = {}
    for match in matches:
        by_nodes.setdefault(tuple(lin.node for lin in match.linears), []).append(match)
    chosen = []
    for same in by_nodes.values():
        weights = [example_inputs[position[lin.weight]] for lin in same[0].linears]
        digest = weight_hash(weights) if len(same) > 1 else ""
        chosen.append(next((m for m in same if entries[m.site.weights].weight_hash == digest), same[0]))
    return chosen


def _chosen(plan: Plan, options: BackendOptions) -> list[SitePlan]:
    """The plan's sites that the options let through."""
    names = [name for entry in plan.sites for name in entry.site.weights] + [s.name for s in plan.skipped]
    keep = parameter_filter(options.include, options.exclude, names)
    return [
        entry
        for entry in plan.sites
        if min(entry.site.d_in, *entry.site.d_outs) >= options.least_features and not any(map(keep, entry.site.weights))
    ]


def is_left_dense(match: Match, options: BackendOptions, decode: bool) -> bool:
    """Whether a prompt stays dense, as asked: more rows than a batch in decode has, or than kernels are faster for."""
    few = match.rows and match.rows <= (ops.MOST_DECODED if decode else 1)
    return options.prefill == "dense" and not few


def is_decode(match: Match, weights: Sequence[Tensor], entry: SitePlan | None) -> bool:
    """Whether the kernels take this site: one dtype they know, and faster for these rows (``None``: for any number).

    Without a plan densities are unknown, and one row is assumed to gain.
    """
    rows, device, dtype = match.rows, weights[0].device, weights[0].dtype
    if rows == 0 or _is_mixed(match, weights) or dtype not in ops.DTYPES or not ops.is_supported(device.type):
        return False
    if entry is None or "threshold" not in entry.tensors:
        if entry is None or entry.family != "dense":
            return rows == 1
        return all(ops.linear_is_faster(rows, lin.d_in, lin.d_out, dtype, device) for lin in match.linears)
    if not (faster := _is_faster(entry, rows, dtype, device)):
        told = "%s: for %s rows the dense product is faster than the masked kernel here"
        log.debug(told, entry.site.name, rows or "any number of")
    return faster


def _is_faster(entry: SitePlan, rows: int | None, dtype: torch.dtype, device: torch.device) -> bool:
    site, basis = entry.site, entry.tensors.get("output_basis")
    if entry.family == "gated":
        return ops.gated_is_faster(rows, site.d_in, site.d_outs[0], entry.live[0] / site.d_in, dtype, device)
    d, density = (site.d_in, entry.flops_kept) if basis is None else (basis.shape[1], entry.live[0] / basis.shape[1])
    gated = site.kind == "gate_up" and basis is None
    before = None if basis is None else site.d_in
    return ops.masked_is_faster(rows, d, site.d_out, density, dtype, device, gated, before)


def _is_mixed(match: Match, weights: Sequence[Tensor]) -> bool:
    """Whether there are several dtypes, as under autocast, also if it begins inside of the graph."""
    nodes = [match.x, *(lin.node for lin in match.linears)]
    return len({*(n.meta["example_value"].dtype for n in nodes), *(w.dtype for w in weights)}) > 1


def _stack_form(match: Match, weights: Sequence[Tensor], entry: SitePlan, options: BackendOptions) -> str:
    """How the parts of a masked stack are computed where the masked kernels are not: ``ops.stack_form``."""
    site, weight = entry.site, weights[0]
    copied = entry.family == "gated" and (options.free_dense_weights or sum(w.nbytes for w in weights) > COPIED)
    if entry.family not in ("neuron", "gated") or copied or _is_mixed(match, weights):
        return "apart"
    return ops.stack_form(match.rows, site.d_in, site.d_outs, weight.dtype, weight.device)


def _is_late(size: torch.SymInt) -> bool:
    """Whether what is found out about a symbolic size no longer becomes a guard: they are written."""
    return bool(getattr(getattr(size.node, "shape_env", None), "frozen", True))


def are_guarded(example_inputs: Sequence[Any], options: BackendOptions) -> bool:
    """Whether Dynamo's guards hold the sizes and strides of a graph's inputs, so that asserting them is to no purpose.

    An adapter adds two inputs of its own; asserting all of them at every call took 3 % of a prompt on a GPU, where a
    small model waits for its launches. Guards hold what Inductor finds out about a symbolic size, too, if they are not
    written yet. Not so what a backward pass gets, or strides that ``free_dense_weights`` changes.
    """
    symbolic = [s for t in example_inputs for s in getattr(t, "shape", (t,)) if isinstance(s, torch.SymInt)]
    return not (any(map(_is_late, symbolic)) or options.free_dense_weights or torch.is_grad_enabled())


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions, guarded: bool = False
) -> Callable[..., Any]:
    if options.compiler != "inductor":
        return lookup_backend(options.compiler)(gm, list(example_inputs))

    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = {"size_asserts": False} if guarded else {}
    patches |= list_mode_options(options.mode) if options.mode else {}
    patches |= options.inductor or {}
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


Choose = Callable[[tuple[Any, ...]], Sequence[Any]]


def _choice(places: Sequence[int], among: int) -> Choose:
    """What gives the inputs at these places, of so many."""
    if len(places) == among:
        return tuple  # the same one
    return itemgetter(*places) if len(places) > 1 else lambda args: [args[i] for i in places]


def _refreshing(compiled: Callable[..., Any], refresh: Refresh, taken: Choose, share: bool) -> Callable[..., Any]:
    """Packed copies follow the weights: checked before each call, rewritten in place if a weight changed.

    ``compiled`` is given the inputs that are ``taken``. With ``share`` the weights become views of the
    copies after the first call, whose strides the graph was compiled for.
    """

    watched = {i for _, places in refresh for i in places}
    weights_of = itemgetter(min(watched), *watched)  # of one place alone it would give no tuple
    seen: Stamp = [], []

    def call(*args: Any) -> Any:
        nonlocal seen, share
        now = stamp(weights_of(args))
        if now != seen:
            for bound, places in refresh:
                bound.refresh([args[i] for i in places])
            seen = now
        result = compiled(*taken(args))
        if share:
            share = False
            for bound, places in refresh:
                bound.share([args[i] for i in places])
        return result

    return call


follow_generate(rana)
