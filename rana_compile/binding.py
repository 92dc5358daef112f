"""Bind a plan to live parameters: check that they are the plan's, pack what decode reads, refresh it when they change.

Packed tensors are shared by all graphs of a model (prefill and decode, static and symbolic) and die with it.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.adapters.base import Fitted, stack
from rana_compile.memory import naming_remedy
from rana_compile.plan import Plan, SitePlan
from rana_compile.types import PlanError

LESS_MEMORY = (
    "adapted weights are laid out beside the model's own: leave some of them dense (include, exclude), or use bfloat16"
)
Stamp = tuple[list[int], list[int]]  # where weights lie, and how often each was written
SAMPLE = 4096  # elements of each weight that are remembered
_THRESHOLDS = {"threshold", "gate_threshold"}  # what a refit changes
_FITTED = _THRESHOLDS | {"probe"}  # what lies in one tensor
_ALIGNED = 32  # elements of it, of which each part starts at a multiple
REPLACED = 0.5  # relative change of them from which weights are others, not the same ones trained further
_PLACE, _VERSION = Tensor.data_ptr, attrgetter("_version")


def stamp(weights: Sequence[Tensor]) -> Stamp:
    """Changes whenever a weight is written in place or replaced. Made at every call: no Python for each weight."""
    try:
        versions = list(map(_VERSION, weights))
    except RuntimeError:  # tensors made in inference mode count nothing
        versions = [0 if w.is_inference() else w._version for w in weights]
    return list(map(_PLACE, weights)), versions


@contextmanager
def plainly() -> Iterator[None]:
    """No gradients, no autocast, no inference mode: what is made inside may be kept and used anywhere."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


class Bound:
    """One adapted site and its live weights (as the model stores them).

    Attributes:
        fitted: thresholds and probes. What ``stored`` and others hold of them are views of it.
        folded: what the plan stores and what derives from the weights, for the masked dense form.
        packed: layouts for the masked kernels.
    """

    def __init__(self, entry: SitePlan, weights: Sequence[Tensor], check: bool = True) -> None:
        entry.check(weights, check)
        self.entry = entry
        self._check = check
        self.device = weights[0].device
        self._family = FAMILIES[entry.family]
        self._stored: Tensors = {k: t.to(self.device) for k, t in entry.tensors.items()}
        with plainly():  # copies: a refit overwrites them, the plan's own stay
            self.fitted = _in_one({k: t for k, t in self._stored.items() if k in _FITTED})
            self._stored |= {name: self.fitted.part(name) for name in self.fitted.places} if self.fitted else {}
        self._folded: Tensors | None = None
        self._packed: Tensors | None = None
        self._stacked: Tensors | None = None
        self._stamp = stamp(weights)
        self._sample = _sample(weights)

    @property
    def stored(self) -> Tensors:
        return self._stored

    @property
    def _held(self) -> tuple[Tensors, ...]:
        return self._stored, self._folded or {}, self._packed or {}, self._stacked or {}

    @property
    def buffers(self) -> list[Tensor]:
        """All tensors that this site holds so far."""
        return [t for held in self._held for t in held.values()]

    def folded(self, weights: Sequence[Tensor]) -> Tensors:
        if self._folded is None:
            with plainly(), naming_remedy(LESS_MEMORY):
                self._folded = self._stored | self._derive(weights)
        return self._folded

    def packed(self, weights: Sequence[Tensor]) -> Tensors:
        if self._packed is None:
            with plainly(), naming_remedy(LESS_MEMORY):
                self._packed = self._pack(weights)
        return self._packed

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """The weights side by side, [d_in, d_out]: of a neuron adapter what is packed, else a copy."""
        if self.entry.family == "neuron":
            return self.packed(weights)["weight_t"]
        if self._stacked is None:
            with plainly(), naming_remedy(LESS_MEMORY):
                self._stacked = self._stack(weights)
        return self._stacked["weight_t"]

    def refresh(self, weights: Sequence[Tensor]) -> None:
        """Bring what was derived from the weights up to date, in place, if the weights have changed.

        Raises PlanError if they are others: other tensors with other values, or the same tensors overwritten with
        values far from those the plan was fitted on. Training, which changes them little, is followed.
        """
        now = stamp(weights)
        if now == self._stamp:
            return
        if now[0] != self._stamp[0]:
            self.entry.check(weights, self._check)  # other tensors, no update of these: a graph may serve two models
        elif self._check and (change := _relative_change(self._sample, _sample(weights))) > REPLACED:
            raise PlanError(
                f"{self.entry.site.name}: its weights were overwritten since the plan was bound (they changed by "
                f"{change:.0%}); calibrate again, or load the weights of the plan"
            )
        self._write(weights)
        self._stamp = now

    def succeed(self, entry: SitePlan) -> None:
        """Go on with the thresholds of a refitted entry: those that compiled graphs hold are overwritten."""
        self.entry = entry
        with plainly():
            for name in _THRESHOLDS & set(self._stored):
                self._stored[name].copy_(entry.tensors[name])
        self._stamp = [], []  # whatever else was made of them follows at the next call

    def _write(self, weights: Sequence[Tensor]) -> None:
        with plainly():
            if self._folded is not None:
                _copy(self._folded, self._stored | self._derive(weights))
            if self._packed is not None:
                _copy(self._packed, self._pack(weights))
            if self._stacked is not None:
                _copy(self._stacked, self._stack(weights))

    def share(self, weights: Sequence[Tensor]) -> None:
        """Let the parameters be views of the packed layouts, where those hold them; their own memory is freed."""
        with plainly():
            views = self._family.unpacked(self.entry.site, self._packed) if self._packed is not None else ()
            for weight, view in zip(weights, self.entry.site.oriented(views), strict=False):
                weight.data = view
        self._stamp = stamp(weights)

    def _derive(self, weights: Sequence[Tensor]) -> Tensors:
        return self._family.derive(self.entry.site.oriented(weights), self._stored)

    def _stack(self, weights: Sequence[Tensor]) -> Tensors:
        return {"weight_t": stack(self.entry.site.oriented(weights)).t().contiguous()}

    def _pack(self, weights: Sequence[Tensor]) -> Tensors:
        site = self.entry.site
        return self._family.pack(site, site.oriented(weights), self._stored)


def _copy(old: Tensors, new: Tensors) -> None:
    for name, tensor in new.items():
        old[name].copy_(tensor)


def _in_one(tensors: Tensors) -> Fitted | None:
    """Copies of all, if there are any."""
    if not tensors:
        return None
    places, n = {}, 0
    for name, t in tensors.items():
        places[name], n = (n, t.shape), n + -(-t.numel() // _ALIGNED) * _ALIGNED
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    fitted = Fitted(next(iter(tensors.values())).new_zeros(n, dtype=dtype), places)
    for name, t in tensors.items():
        fitted.part(name).copy_(t)
    return fitted


def _sample(weights: Sequence[Tensor]) -> Tensor:
    """A few elements of each weight, from all over it."""
    with plainly():
        parts = [w.detach().flatten()[:: max(1, w.numel() // SAMPLE)].float() for w in weights]
        return torch.cat(parts)


def _relative_change(old: Tensor, new: Tensor) -> float:
    with plainly():
        return float((new - old).norm() / old.norm().clamp_min(1e-30))


_BOUND: WeakKeyDictionary[Plan, WeakTensorKeyDictionary] = WeakKeyDictionary()


def bind(plan: Plan, entry: SitePlan, weights: Sequence[Tensor], check: bool = True) -> Bound:
    """The bound site of these weights, made once per plan and model, and anew when they move to another device.

    Raises:
        PlanError: shapes, dtype or (with ``check``) values are not those the plan was fitted on.
    """
    by_weight = _BOUND.setdefault(plan, WeakTensorKeyDictionary())
    sites: dict[str, Bound] = by_weight.setdefault(weights[0], {})  # tied weights belong to several
    bound = sites.get(entry.site.name)
    if bound is None or bound.entry.site != entry.site or bound.device != weights[0].device:
        bound = sites[entry.site.name] = Bound(entry, weights, check)
    bound.refresh(weights)
    return bound


_SUCCESSORS: WeakKeyDictionary[Plan, Plan] = WeakKeyDictionary()


def succeed(old: Plan, new: Plan) -> None:
    """Whatever is compiled with one plan, or will be, goes on with the thresholds of its refitted successor."""
    entries = {entry.site.name: entry for entry in new.adapted}
    by_weight = _BOUND.setdefault(old, WeakTensorKeyDictionary())
    for sites in by_weight.values():
        for bound in sites.values():
            bound.succeed(entries[bound.entry.site.name])
    _BOUND[new] = by_weight
    _SUCCESSORS[old] = new


def latest(plan: Plan) -> Plan:
    """The plan, or the one refitted last in its place."""
    while plan in _SUCCESSORS:
        plan = _SUCCESSORS[plan]
    return plan


def _count_fused_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Fused optimisers write weights without counting it as a change, which ``stamp`` would never see."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_count_fused_steps)


def bound_plans(weights: Sequence[Tensor]) -> list[Plan]:
    """Plans that are bound to any of these weights."""
    return [plan for plan, by_weight in _BOUND.items() if any(w in by_weight for w in weights)]


def bound_sites(weights: Sequence[Tensor]) -> list[Bound]:
    """What is bound to these weights, of all plans."""
    return [bound for by_weight in _BOUND.values() for w in weights for bound in by_weight.get(w, {}).values()]
