"""Look at an adapted model before trusting it: run it eagerly, count what it computes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch

from rana_compile.data import as_batches
from rana_compile.flops import total_dense_flops
from rana_compile.offload import Weights
from rana_compile.passes.interpret import capturing
from rana_compile.passes.record import Adapted
from rana_compile.plan import Plan


class AdaptedModel:
    """Called like the model; every token computed with its masks.

    Attributes:
        plan: the plan in force.
    """

    def __init__(self, plan: Plan, run: Callable[..., Any], handler: Adapted) -> None:
        self.plan = plan
        self._run = run
        self._handler = handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    @property
    def flops_kept(self) -> float:
        """Realised FLOPs per token over all calls so far, as a share of the dense FLOPs of the plan's sites."""
        sites = [entry.site for entry in self.plan.sites]
        return sum(map(self._handler.flops, sites)) / total_dense_flops(sites)


@contextmanager
def adapted(
    model: torch.nn.Module, plan: Plan | str | PathLike[str], *, check_weights: bool = True
) -> Iterator[AdaptedModel]:
    """Yields the adapted model as a callable, run eagerly: the plain formulas, no kernels, no Inductor.

    For quality figures, and for checking a compiled model. The model itself is not changed.
    Raises PlanError if the plan cannot be read or belongs to other weights; with ``check_weights=False`` they may have
    been trained since.
    """
    chosen = Plan.of(plan)
    handler = Adapted({s.site: (s.family, s.tensors) for s in chosen.adapted})
    with running(model, chosen, handler, check_weights) as run:
        yield AdaptedModel(chosen, run, handler)


@contextmanager
def running(
    model: torch.nn.Module, plan: Plan, handler: Adapted, check_weights: bool = True
) -> Iterator[Callable[..., Any]]:
    """Yields the model as a callable with the plan's sites in the handler's hands, run eagerly.

    Raises PlanError if the plan belongs to other weights.
    """
    plan.check(model, check_weights)
    names = {name for s in plan.sites for name in s.site.weights}
    separate = any(s.site.kind == "gate" for s in plan.sites)
    eligible = lambda name: None if name in names else "not in the plan"  # noqa: E731
    with capturing(model, Weights(model), eligible, separate) as (run, capture):
        capture.handler = handler
        yield run


def measure_cost(model: torch.nn.Module, plan: Plan | str | PathLike[str], batches: Iterable[Any]) -> float:
    """Realised FLOPs per token on other data, as a share of the dense FLOPs of the plan's sites."""
    with adapted(model, plan) as run:
        for batch in as_batches(batches, Weights(model).device):
            run(**batch)
        return run.flops_kept
