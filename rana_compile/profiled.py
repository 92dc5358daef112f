"""The callable of a graph that calibrates itself: dense until its model has a plan, then adapted.

Dynamo lets models of one structure share a graph, so each model has its own ``Use`` of it. A graph is compiled a second
time where it stands, within Dynamo's own context, so Dynamo sees no recompilation.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch.utils.weak import WeakTensorKeyDictionary

from rana_compile.binding import Stamp, stamp
from rana_compile.config import BackendOptions
from rana_compile.correction import Target
from rana_compile.passes.find import bind_sites, find_sites
from rana_compile.passes.interpret import Handler
from rana_compile.passes.match import Found
from rana_compile.passes.names import source_name, used_name
from rana_compile.passes.products import products
from rana_compile.passes.replay import Output, Replay
from rana_compile.plan import Plan
from rana_compile.recipes import SEPARATE_GATES, check_recipe
from rana_compile.self_calibration import session_of
from rana_compile.types import OutOfMemoryError, PlanError, RanaError, parameter_filter

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Compile = Callable[[Sequence[Any], Plan | None], Compiled]


def profiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: BackendOptions,
    compile_graph: Compile,
    given: tuple[Plan, Found] | None = None,
) -> Compiled:
    """A graph that is adapted at once if there is a plan, given or fitted by now, or else calibrates itself.

    Args:
        compile_graph: compiles ``gm`` for example inputs with a plan's adapters, or densely for None.
        given: the user's plan and its sites in this graph.

    Raises ConfigError for bad options, PlanError if the given plan does not belong to the weights.
    """
    plan, found = given or (None, _found(gm, options))
    if not found.matches:
        log.info("rana: nothing to adapt in a graph of %d nodes", len(gm.graph.nodes))
        return compile_graph(example_inputs, None)
    return Profiled(gm, example_inputs, found, options, compile_graph, plan)


def _found(gm: fx.GraphModule, options: BackendOptions) -> Found:
    check_recipe(options.recipe, Target.of(options.flops_budget, None, None).unit)
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = [*map(source_name, nodes), *(used_name(p.node, p.weight) for p in products(gm.graph))]
    keep = parameter_filter(options.include, options.exclude, [name for name in names if name])
    return find_sites(gm, keep, options.recipe in SEPARATE_GATES, options.least_features)


class Profiled:
    """A compiled graph. Dynamo lets models of one structure share it, so it dispatches on the weights of a call.

    Attributes:
        parameters: positions of the module's parameters among the inputs.
        names: positions of named weights.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        found: Found,
        options: BackendOptions,
        compile_graph: Compile,
        given: Plan | None,
    ) -> None:
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        position = {node: i for i, node in enumerate(nodes)}
        self.gm, self.found, self.options, self.given = gm, found, options, given
        self.parameters = tuple(i for i, value in enumerate(example_inputs) if isinstance(value, nn.Parameter))
        self.adaptable = {lin.weight_name: position[lin.weight] for m in found.matches for lin in m.linears}
        named = [(source_name(node), node) for node in nodes] + [
            (used_name(p.node, p.weight), p.weight) for p in products(gm.graph) if p.weight in position
        ]
        self.names = {name: position[n] for name, n in named if name and position[n] in self.parameters}
        self.names |= self.adaptable  # which functional_call may have replaced by plain tensors
        self.autocast = _autocast_of(example_inputs[self.parameters[0]].device.type)
        self._key = next(iter(self.adaptable.values()))
        self._tracing: TracingContext | None = TracingContext.get()
        self._context = copy.copy(self._tracing)  # compilers leave the model's own tensors in it
        self._compiling = CompileContext.try_get()
        self._compile = compile_graph
        self._dense: Compiled | None = None
        self._caller = get_ident()
        self._uses = WeakTensorKeyDictionary()
        self._examples = list(example_inputs)
        self._use_of(example_inputs)
        self._tracing = None
        kept = set(self.parameters)  # do not keep a model or a cache alive
        self._examples = [None if i in kept else _fake(v, self._context) for i, v in enumerate(example_inputs)]

    def __call__(self, *args: Any) -> Any:
        if get_ident() != self._caller:
            self._caller = get_ident()
            _allow_threads()
        return self._use_of(args)(*args)

    def _use_of(self, args: Sequence[Any]) -> "Use":
        use: Use | None = self._uses.get(args[self._key])
        if use is not None:
            return use
        with compile_lock:  # another thread may be making it
            use = self._uses.get(args[self._key])
            if use is None:
                use = self._uses[args[self._key]] = Use(self, args)
        return use

    def compiled(self, plan: Plan | None, args: Sequence[Any]) -> Compiled:
        """The graph with a plan's adapters for the weights in these inputs, or dense for all weights."""
        if plan is None and self._dense is not None:
            return self._dense
        examples = [args[i] if i in self.parameters else value for i, value in enumerate(self._examples)]
        with self._as_dynamo_left_it():
            run = self._compile(examples, plan)
        if plan is None:
            self._dense = run
        return run

    @contextmanager
    def _as_dynamo_left_it(self) -> Iterator[None]:
        if TracingContext.try_get() is self._tracing is not None:  # Dynamo is tracing this very graph
            yield
            return
        with tracing(copy.copy(self._context)), compile_context(self._compiling):
            yield


class Use:
    """One model's use of a graph: dense until its session has a plan, then adapted."""

    def __init__(self, graph: Profiled, args: Sequence[Any]) -> None:
        self.graph = graph
        self.parameters = graph.parameters
        self._weights = [weakref.ref(args[i]) for i in graph.parameters]
        self.session = session_of([args[i] for i in graph.adaptable.values()], graph.options, graph.given)
        self._plan: Plan | None = None
        self._stamp: Stamp = [], []
        self._run: Compiled | None = None
        self._switch(args)
        # not before: Dynamo may start over while a graph is compiled, and clears the first one
        with self.session.lock:
            self.session.add(graph.found, {name: args[i] for name, i in graph.names.items()})
        self.replay = Replay(graph.gm, bind_sites(graph.gm, list(self.session.sites.values())))

    def __call__(self, *args: Any) -> Any:
        session = self.session
        if session.recording:
            with session.lock:
                if session.recording:
                    self._record(args)
        if self._plan is not session.plan:
            self._switch(args)
        try:
            return self._running(*args)
        except PlanError as error:  # raised before anything ran
            self._give_up(error, self._plan)
            self._switch(args)
            return self._running(*args)

    @property
    def _running(self) -> Compiled:
        assert self._run is not None  # from the first switch on
        return self._run

    def _record(self, args: Sequence[Any]) -> None:
        now = self._stamp_of(args)
        if now != self._stamp:
            moved = now[0] != self._stamp[0]
            self._stamp = now
            if moved or not self._trains(args):  # what is kept are inputs: training between the calls does no harm
                self.session.restart("the weights changed while calibrating")
        if self.session.recording and self.replay.has_output:
            if self.replay.is_random:
                self.session.pass_over()
            else:
                self.session.see(self, args)

    def _trains(self, args: Sequence[Any]) -> bool:
        return torch.is_grad_enabled() and any(args[i].requires_grad for i in self.graph.adaptable.values())

    def _switch(self, args: Sequence[Any]) -> None:
        """Run as the session has decided; as before where it is interrupted, and the next call tries again."""
        with compile_lock, self.session.lock:
            plan, now = self.session.plan, self._stamp_of(args)
            if self._run is not None and self._plan is plan:  # another thread has seen to it by now
                return
            try:
                run = self.graph.compiled(plan, args)
            except (PlanError, OutOfMemoryError) as error:
                self._give_up(error, plan)
                plan, run = None, self.graph.compiled(None, args)
            self._plan, self._stamp, self._run = plan, now, run

    def _give_up(self, error: RanaError, plan: Plan | None) -> None:
        if self.graph.given is not None:
            raise error
        with self.session.lock:
            if plan is None or plan is not self.session.plan:
                return
            if isinstance(error, PlanError):
                self.session.restart(str(error))
            else:
                self.session.stay_dense(str(error))

    def _stamp_of(self, args: Sequence[Any]) -> Stamp:
        return stamp([args[i] for i in self.graph.parameters])

    def rows(self, args: Sequence[Any]) -> int:
        return self.replay.rows(args)

    def run_again(self, inputs: Mapping[int, Any], handler: Handler) -> Output:
        args = {i: v.clone() if isinstance(v, Tensor) else v for i, v in inputs.items()}
        for i, ref in zip(self.graph.parameters, self._weights, strict=True):
            if (weight := ref()) is None:
                raise RanaError("the model was deleted while calibrating")
            args[i] = _constant(weight)
        device, dtype, enabled = self.graph.autocast
        with torch.autocast(device, dtype, enabled):
            return self.replay.run([args[i] for i in sorted(args)], handler)


def _allow_threads() -> None:
    """Let several threads call what is compiled.

    Dynamo moves the graph that it took to the front of the list it looks through. A thread that is looking meanwhile
    misses its own graph and compiles it again; after eight times it runs the model as it was, dense
    (pytorch/pytorch#123177, #118260). A list that keeps its order is looked through from the oldest graph on, and for
    one thread costs the guards of those before its own: a millisecond for each where a model has 270 weights.
    """
    if (reorder := getattr(torch._C._dynamo.eval_frame, "_set_lru_cache", None)) is not None:
        reorder(False)


def _constant(weight: Tensor) -> Tensor:
    """The weight without gradient; one made in inference mode is copied, autograd refuses it."""
    return weight.clone() if weight.is_inference() else weight.detach()


def _fake(value: Any, context: TracingContext) -> Any:
    """The stand-in that the first compilation made for an input, parameters themselves excepted."""
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
        return value
    assert context.fake_mode is not None
    return context.fake_mode.from_tensor(value)  # remembered while the value lives


def _autocast_of(device: str) -> tuple[str, torch.dtype, bool]:
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
