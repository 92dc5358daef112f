"""Run a Dynamo graph node by node, with every site in the hands of a handler: for calibration, not for speed.

One handler records inputs and gradients, another computes adapters; the graph itself is never changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import count
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.pgo import get_code_state
from torch._guards import TracingContext
from torch.utils.checkpoint import checkpoint

from rana_compile.interrupts import to_the_end
from rana_compile.offload import Weights
from rana_compile.passes.expand import expand
from rana_compile.passes.find import find_sites
from rana_compile.passes.match import Found, Match
from rana_compile.passes.segments import segments
from rana_compile.types import RanaError, Site

Handler = Callable[[Site, Tensor, Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor]]


_CAPTURES = count()


class SiteInterpreter(fx.Interpreter):
    """Executes a graph; ``handler(site, x, weights, biases)`` gives the outputs of a site's linears.

    Of a handler with ``again``, which gives the same outputs and nothing else, little is kept for the backward pass.
    """

    def __init__(
        self, gm: fx.GraphModule, matches: Sequence[Match], handler: Handler, weights: Weights | None = None
    ) -> None:
        super().__init__(gm)
        self._weights = weights
        self._sites = matches
        self._matches = {lin.node: (match, i) for match in matches for i, lin in enumerate(match.linears)}
        self._outputs: dict[int, dict[int, Tensor]] = {}  # of matches, those still to be read
        self._handler = handler
        kept = {lin.weight for match in matches for lin in match.linears}  # also where the graph reads a view of it
        for forgotten in self.user_to_last_uses.values():
            forgotten[:] = [node for node in forgotten if node not in kept]

    def run(self, *args: Any, **settings: Any) -> Any:
        again: Handler | None = getattr(self._handler, "again", None)
        if again is None or not (self._weights is None or self._weights.has_all):
            return super().run(*args, **settings)
        first, *forgotten = segments(self.graph, self._sites)
        last = forgotten.pop() if forgotten else []
        self.env, self.args_iter = {}, iter(args)
        try:
            self._run_nodes(first)
            for nodes in forgotten:
                self._run_forgetting(nodes, again)
            self._run_nodes(last)
            return self.env[(last or first)[-1]]
        finally:  # the outputs' graph holds this interpreter, for the backward pass
            self.env = {}

    def _run_nodes(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            self.env[node] = self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                del self.env[dead]

    def _run_forgetting(self, nodes: Sequence[fx.Node], again: Handler) -> None:
        """As ``_run_nodes``, once more in the backward pass, with the sites in the hands of ``again``."""
        inside = set(nodes)
        needed = list(dict.fromkeys(n for node in nodes for n in self._inputs(node) if n not in inside))
        leaving = [node for node in nodes if not inside.issuperset(node.users)]
        values = [self.env[node] for node in needed]
        handlers = iter([self._handler])

        def run(*given: Any) -> list[Any]:
            part = copy(self)
            part.env, part._outputs = dict(zip(needed, given, strict=True)), {}
            part._handler = next(handlers, again)
            part._run_nodes(nodes)
            return [part.env[node] for node in leaving]

        self.env.update(zip(leaving, checkpoint(run, *values, use_reentrant=False), strict=True))
        for node in nodes:
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a node needs; of a site, which its first linear runs, also what views of weights were made of."""
        if node not in self._matches:
            return node.all_input_nodes
        match, _ = self._matches[node]
        own = [n for lin in match.linears for n in (lin.weight, lin.bias) if n is not None]
        return [*node.all_input_nodes, match.x, *own]

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._matches:
            return super().run_node(n)
        match, index = self._matches[n]
        if id(match) not in self._outputs:
            weights = [self._value(lin.weight) for lin in match.linears]
            biases = [None if lin.bias is None else self._value(lin.bias) for lin in match.linears]
            oriented = match.site.oriented(weights)
            outputs = self._handler(match.site, self._value(match.x), oriented, biases)
            self._outputs[id(match)] = dict(enumerate(outputs))
        return self._outputs[id(match)].pop(index)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        return fx.node.map_arg(args, self._value)

    def _value(self, node: fx.Node) -> Any:
        value = self.env[node]
        return value if self._weights is None else self._weights.resolved(value)


class Capture:
    """A backend for ``torch.compile`` that keeps what it finds and runs the graph through ``handler``."""

    def __init__(
        self,
        weights: Weights,
        eligible: Callable[[str], str | None],
        separate_gates: bool = False,
        min_features: int = 0,
    ) -> None:
        self._weights = weights
        self.handler: Handler | None = None
        self.entry: CodeType | None = None  # of the frame that calls the model
        self.found: list[Found] = []
        self.codes: list[CodeType] = []  # of frames that hold a captured graph
        self._eligible = eligible
        self._separate_gates = separate_gates
        self._min_features = min_features

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        gm = expand(gm)
        found = find_sites(gm, self._eligible, self._separate_gates, self._min_features)
        self.found.append(found)
        traced: Sequence[Any] = getattr(TracingContext.try_get(), "traced_code", None) or ()
        self.codes.extend([code for code in traced if id(code) == id(self.entry)] or traced)

        def run(*args: Any) -> Any:
            with self._weights.loaded_again():
                return SiteInterpreter(gm, found.matches, self._current(), self._weights).run(*args)

        return run

    def _current(self) -> Handler:
        if self.handler is None:
            raise RanaError("a captured graph was called outside of calibration")
        return self.handler


@contextmanager
def capturing(
    model: torch.nn.Module,
    weights: Weights,
    eligible: Callable[[str], str | None] = lambda name: None,
    separate_gates: bool = False,
    min_features: int = 0,
) -> Iterator[tuple[Callable[..., Any], Capture]]:
    """Yields (the model as a callable whose graphs run through ``capture.handler``, the capture).

    Meanwhile the model is in evaluation mode, on one device (``Weights``), its parameters without gradients.
    Afterwards Dynamo forgets these graphs, so that nothing stays alive and later compilations start clean. Dynamo keeps
    graphs by code object: the model is called from one of this capture's own, so that what the user has compiled stays.
    Only of a model with graph breaks, whose parts have no frame but their own, is that compiled again.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    capture = Capture(weights, eligible, separate_gates, min_features)
    capture.entry = code = call.__code__.replace(co_name=f"rana_capture_{next(_CAPTURES)}")
    entry = FunctionType(code, call.__globals__, closure=call.__closure__)
    limits = torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024)
    # one gradient mode for all passes: tracing takes longer than running
    with weights.stand_ins(), undisturbed(model), limits, torch.enable_grad():
        try:
            yield torch.compile(entry, backend=capture), capture
        finally:
            capture.handler = None
            capture.found.clear()
            to_the_end(lambda: _forget(capture.codes))


def _forget(codes: Sequence[CodeType]) -> None:
    """Drop compiled graphs of these codes, and what Dynamo remembers of their dynamic sizes.

    With that memory a later ``model.compile`` would start with symbolic lengths, which take minutes longer to compile.
    """
    for code in codes:
        torch._dynamo.reset_code(code)
    remembered = get_code_state()
    places = {(code.co_filename, code.co_firstlineno, code.co_name) for code in codes}
    for key in [k for k in remembered if (k.filename, k.firstlineno, k.name) in places]:
        del remembered[key]


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients and nothing compiled inside; the model as it was afterwards.

    What ``module.compile`` left in a module would run instead of the module that is to be looked at.
    """
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    training = {module: module.training for module in model.modules()}
    wanted = [p for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        for module, flag in training.items():
            module.training = flag
        for p in wanted:
            p.requires_grad_(True)

    try:
        model.eval()
        for p in wanted:
            p.requires_grad_(False)
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        to_the_end(restore)
