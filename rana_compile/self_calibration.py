"""No plan given: calibrate inside the backend, on the inputs of the first calls (profile-guided optimisation).

    first calls       dense, through Inductor; inputs are kept (a bounded number of them)
    enough tokens     fit on them, check adapted against dense on calls held back from the fit
    from then on      every graph of the model runs adapted, or, if the check failed, dense as before

A backend sees graphs, not models: graphs that share a weight belong to one ``Session``, which fits one plan for all.
Kept calls are replayed on copies of their inputs, so a cache that is updated in place is never touched.
"""

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from rana_compile.binding import bound_plans, latest, plainly
from rana_compile.config import BackendOptions
from rana_compile.memory import naming_remedy
from rana_compile.objective import divergence
from rana_compile.passes.interpret import Handler
from rana_compile.passes.match import Found
from rana_compile.passes.record import Adapted, dense_handler
from rana_compile.passes.replay import Output
from rana_compile.plan import Plan
from rana_compile.recorded import fit_recorded
from rana_compile.report import totals
from rana_compile.types import RanaError, Site, Skipped, common_name

log = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30  # of inputs, for all calls of a session
FEW_ROWS = 8  # a call of fewer rows (decode) brings its whole cache for little evidence: a sample of them is kept
PATIENCE = 4  # times calibration_tokens are seen before fitting on less than that
LEAST_SHARE = 1 / 8  # of calibration_tokens that must have been kept by then
MAX_RESTARTS = 3
LESS_MEMORY = "calls of fewer tokens need less, or calibrate beforehand: rana_compile.calibrate(model, batches)"


class Use(Protocol):
    """One model's use of one graph."""

    @property
    def parameters(self) -> Sequence[int]:
        """Positions of the module's parameters among the inputs."""

    def rows(self, args: Sequence[Any]) -> int:
        """Rows (batch · sequence) of a call."""

    def run_again(self, inputs: Mapping[int, Any], handler: Handler) -> Output:
        """The result of a call on copies of its inputs, with every site in the handler's hands."""


@dataclass(frozen=True)
class Call:
    """One recorded call: whose it was (weakly), and copies of the inputs that are not parameters, by position."""

    use: weakref.ref[Use]
    inputs: Mapping[int, Any]
    rows: int


@dataclass(eq=False)
class Session:
    """What the graphs of one model share while they wait for a plan, and the plan afterwards."""

    options: BackendOptions
    sites: dict[tuple[str, ...], Site] = field(default_factory=dict)
    weights: dict[str, "weakref.ref[Tensor]"] = field(default_factory=dict)
    skipped: dict[Skipped, None] = field(default_factory=dict)
    found: Found | None = None
    plan: Plan | None = None
    outcome: str = ""  # why there is no plan and none is to come
    calls: list[Call] = field(default_factory=list)
    seen: int = 0
    kept: int = 0
    bytes: int = 0
    decode_calls: int = 0
    restarts: int = 0
    said: bool = False  # that calls with dropout are not kept
    lock: Any = field(default_factory=threading.RLock)

    @property
    def recording(self) -> bool:
        return self.plan is None and not self.outcome

    def __str__(self) -> str:
        wanted = f"{self.options.calibration_tokens:,}"
        return self.outcome or f"it is still calibrating, {self.kept:,} of {wanted} tokens kept, {self.seen:,} seen"

    def names_in(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """From a weight's name in the compiled graphs to its name in the whole model."""
        found = {id(p): name for name, p in parameters.items()}
        return {name: name if name in parameters else found.get(id(ref()), name) for name, ref in self.weights.items()}

    def add(self, found: Found, weights: Mapping[str, Tensor]) -> None:
        """The sites of one more graph; a weight belongs to the first site that claims it."""
        self.found = self.found or found
        self.skipped.update(dict.fromkeys(found.skipped))
        taken = {name for names in self.sites for name in names}
        for match in found.matches:
            if not taken & set(match.site.weights):
                self.sites[match.site.weights] = match.site
        self.weights.update({name: weakref.ref(w) for name, w in weights.items()})

    def see(self, use: Use, args: Sequence[Any]) -> None:
        """Keep a call's inputs if they are worth it; fit once there are enough."""
        rows = use.rows(args)
        self.seen += rows
        decode = rows < FEW_ROWS
        self.decode_calls += decode
        if not decode or self._is_drawn():
            inputs = _copies(args, use.parameters)
            size = sum(t.nbytes for t in inputs.values() if isinstance(t, Tensor))
            if self.bytes + size <= KEPT_BYTES:
                self.calls.append(Call(weakref.ref(use), inputs, rows))
                self.kept += rows
                self.bytes += size
        wanted = self.options.calibration_tokens
        if len(self.calls) > 1 and (self.kept >= wanted or self.seen >= PATIENCE * wanted):
            self._fit()

    def pass_over(self) -> None:
        """A call that cannot be replayed: no two runs of it agree."""
        if not self.said:
            self.said = True
            log.warning(
                "rana: calls in training mode with active dropout are not recorded, and run dense until the model is "
                "calibrated: call it in eval() mode first, set dropout to 0, or give a plan"
            )

    def _is_drawn(self) -> bool:
        """Decode calls are kept ever more rarely, 8 in each doubling: 1, 2, ..., 16, 18, ..., 32, 36, ..."""
        return self.decode_calls % (1 << max(0, self.decode_calls.bit_length() - 4)) == 0

    def restart(self, reason: str) -> None:
        """Forget plan and calls: the weights are others now."""
        self.plan, self.calls, self.seen, self.kept, self.bytes, self.decode_calls = None, [], 0, 0, 0, 0
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            self.stay_dense(f"{reason}, {self.restarts} times now; use rana_compile.calibrate(model, batches)")
        else:
            log.info("rana: %s; calibrating on the next calls", reason)

    def _fit(self) -> None:
        calls, self.calls = [call for call in self.calls if call.use() is not None], []
        wanted = self.options.calibration_tokens
        if self.kept < LEAST_SHARE * wanted or len(calls) < 2:
            self.stay_dense(
                f"of {self.seen:,} tokens seen the inputs of only {self.kept:,} could be kept (single tokens with "
                "their caches); use rana_compile.calibrate(model, batches)"
            )
            return
        try:
            plan, apart = self._fitted(calls)
        except RanaError as error:
            self.stay_dense(str(error))
            return
        except BaseException:  # Ctrl-C most of all: the model is dense and usable, and no plan comes of half the calls
            self.restart("the fit was interrupted")
            raise
        what = f"{totals(plan)}; {len(plan.skipped)} weights skipped"
        limit = self.options.max_divergence
        if not apart <= limit:  # NaN is not either
            self.stay_dense(f"divergence {apart:.3g} from the dense outputs exceeds max_divergence={limit} ({what})")
            return
        self.plan = plan
        log.info(
            "rana: calibrated on %s tokens: %s; divergence %.3g on held-back inputs", f"{self.kept:,}", what, apart
        )

    def stay_dense(self, reason: str) -> None:
        """There is no plan, and none is to come."""
        self.plan = None
        self.outcome, self.calls = reason, []
        log.warning("rana: the model stays dense: %s", reason)

    def _fitted(self, calls: list[Call]) -> tuple[Plan, float]:
        """The plan, and how far its outputs are from the dense ones on held-back calls."""
        parameters = {name: w for name, ref in self.weights.items() if (w := ref()) is not None}
        assert self.found is not None
        found = replace(self.found, skipped=tuple(self.skipped))
        recorded = [(call.rows, call) for call in calls]
        with plainly(), torch.enable_grad(), naming_remedy(LESS_MEMORY):
            plan, held_back = fit_recorded(
                parameters, recorded, _replay, found, self.options.flops_budget, self.options.recipe
            )
            return plan, _divergence(plan, held_back)


def _replay(call: Call, handler: Handler) -> Output:
    use = call.use()
    assert use is not None
    return use.run_again(call.inputs, handler)


def _divergence(plan: Plan, calls: Sequence[Call]) -> float:
    """Mean over the calls' rows: KL in nats where outputs are logits, else relative error."""
    adapted = Adapted({s.site: (s.family, s.tensors) for s in plan.adapted})
    total, rows = 0.0, 0
    for call in calls:
        exact, approximate = (_replay(call, handler) for handler in (dense_handler, adapted))
        if exact.logits is not None and approximate.logits is not None:
            apart = divergence(exact.logits, approximate.logits)
        else:
            dense = exact.last_hidden_state
            apart = float((approximate.last_hidden_state - dense).norm() / dense.norm().clamp_min(1e-30))
        total += apart * call.rows
        rows += call.rows
    return total / max(rows, 1)


def _copies(args: Sequence[Any], parameters: Sequence[int]) -> dict[int, Any]:
    with plainly():
        return {
            i: value.detach().clone() if isinstance(value, Tensor) else value
            for i, value in enumerate(args)
            if i not in parameters
        }


_SESSIONS = WeakTensorKeyDictionary()  # weight -> sessions


def session_of(weights: Sequence[Tensor], options: BackendOptions, given: Plan | None = None) -> Session:
    """The session of the model that these weights belong to; with the user's plan there is nothing to fit."""
    if given is not None:
        return Session(options, plan=given)
    known = (session for w in weights for session in _SESSIONS.get(w, ()) if session.options == options)
    session = next(known, None) or Session(options)
    for weight in weights:
        others = _SESSIONS.setdefault(weight, [])
        if session not in others:
            others.append(session)
    return session


def plan_of(model: nn.Module) -> Plan:
    """The plan that a compiled model runs with, to save: given to the backend, or fitted by it.

    Names are as in ``model.state_dict()``; where Dynamo broke the model into parts, their plans are put together.
    Raises RanaError where there is none (yet), and says why.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sessions = list(dict.fromkeys(s for p in parameters.values() for s in _SESSIONS.get(p, ())))
    fitted = [latest(session.plan) for session in sessions if session.plan is not None]
    plans = fitted or bound_plans(list(parameters.values()))[-1:]
    if len(plans) == 1 and all(name in parameters for s in plans[0].sites for name in s.site.weights):
        return plans[0]
    if not fitted:
        why = "; ".join(map(str, sessions)) or (
            'it was not called since model.compile(backend="rana"), or nothing in it can be adapted '
            "(rana_compile.explain tells)"
        )
        raise RanaError(f"the model has no plan: {why}")
    return _joined([(latest(s.plan), s.names_in(parameters)) for s in sessions if s.plan is not None])


def _joined(parts: Sequence[tuple[Plan, Mapping[str, str]]]) -> Plan:
    """One plan of the plans of a model's parts, under the model's names."""
    sites = []
    for plan, names in parts:
        for entry in plan.sites:
            weights = tuple(names[name] for name in entry.site.weights)
            sites.append(replace(entry, site=replace(entry.site, weights=weights, name=common_name(weights))))
    plans = [plan for plan, _ in parts]
    skipped = tuple(dict.fromkeys(s for plan in plans for s in plan.skipped))
    return Plan(tuple(sites), skipped, plans[0].flops_asked, sum(p.model_flops for p in plans), plans[0].info)
