"""Bind a plan to live parameters: check that they are the plan's, pack what decode reads, refresh it when they change.

Packed tensors are shared by all graphs of a model (prefill and decode, static and symbolic) and die with it.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.plan import Plan, SitePlan

Stamp = tuple[tuple[int, int], ...]


def stamp(weights: Sequence[Tensor]) -> Stamp:
    """Changes whenever a weight is written in place or replaced."""
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)


class Bound:
    """One adapted site and its live weights.

    Attributes:
        folded: what the plan stores and what derives from the weights, for the masked dense form.
        packed: layouts for the masked kernels.
    """

    def __init__(self, entry: SitePlan, weights: Sequence[Tensor]) -> None:
        self.entry = entry
        self._family = FAMILIES[entry.family]
        self._stored: Tensors = {k: t.to(weights[0].device) for k, t in entry.tensors.items()}
        self._folded: Tensors | None = None
        self._packed: Tensors | None = None
        self._stamp = stamp(weights)

    @property
    def stored(self) -> Tensors:
        return self._stored

    def folded(self, weights: Sequence[Tensor]) -> Tensors:
        if self._folded is None:
            with torch.no_grad():
                self._folded = self._stored | self._family.derive(weights, self._stored)
        return self._folded

    def packed(self, weights: Sequence[Tensor]) -> Tensors:
        if self._packed is None:
            with torch.no_grad():
                self._packed = self._family.pack(weights, self._stored)
        return self._packed

    def refresh(self, weights: Sequence[Tensor]) -> None:
        """Bring what was derived from the weights up to date, in place, if the weights have changed.

        Raises PlanError if they are other tensors with other values.
        """
        now = stamp(weights)
        if now == self._stamp:
            return
        if [place for place, _ in now] != [place for place, _ in self._stamp]:
            self.entry.check(weights)  # other tensors, not an update of these: a graph may serve two models
        with torch.no_grad():
            if self._folded is not None:
                _copy(self._folded, self._family.derive(weights, self._stored))
            if self._packed is not None:
                _copy(self._packed, self._family.pack(weights, self._stored))
        self._stamp = now


def _copy(old: Tensors, new: Tensors) -> None:
    for name, tensor in new.items():
        old[name].copy_(tensor)


_BOUND: WeakKeyDictionary[Plan, WeakTensorKeyDictionary] = WeakKeyDictionary()


def bind(plan: Plan, entry: SitePlan, weights: Sequence[Tensor]) -> Bound:
    """The bound site of these weights, made once per plan and model.

    Raises:
        PlanError: shapes, dtype or values are not those the plan was fitted on.
    """
    by_weight = _BOUND.setdefault(plan, WeakTensorKeyDictionary())
    bound: Bound | None = by_weight.get(weights[0])
    if bound is None or bound.entry is not entry:
        entry.check(weights)
        bound = by_weight[weights[0]] = Bound(entry, weights)
    bound.refresh(weights)
    return bound
