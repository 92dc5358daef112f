"""Fit on calls that were recorded, where there is a graph but no model and no batches: for the backend."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rana_compile.calibration import Session, split_held_back
from rana_compile.correction import Target
from rana_compile.data import Batch
from rana_compile.passes.interpret import Handler
from rana_compile.passes.match import Found
from rana_compile.plan import Plan
from rana_compile.progress import Progress


def fit_recorded(
    parameters: Mapping[str, Tensor],
    calls: Sequence[tuple[int, Any]],
    replay: Callable[[Any, Handler], Any],
    found: Found,
    flops_budget: float,
    recipe: str,
    seed: int = 0,
) -> tuple[Plan, list[Any]]:
    """As ``calibrate``, on calls that were recorded instead of a model and batches; for the backend.

    Args:
        parameters: weights of all sites by name, as the model stores them.
        calls: (rows, call) of each recorded call.
        replay: runs a call with its sites in a handler's hands and returns what the model would.
        found: the sites, the MLPs they belong to, and what was skipped.

    Returns:
        (the plan, the calls that were held back from the fit). Raises RanaError as ``calibrate`` does.
    """
    capture = _Recorded(found)
    batches: list[Batch] = [{"rows": torch.empty(1, rows, device="meta"), "call": call} for rows, call in calls]
    fitting, held_back = split_held_back(batches)
    with Progress(False, 1) as bar:
        run = lambda rows, call: replay(call, capture.current)  # noqa: E731
        session = Session(parameters, run, capture, bar, seed, fitting, held_back)
        plan = session.fit(Target("flops", flops_budget), recipe, learning_steps=0)  # somebody waits for the call
    return plan, [batch["call"] for batch in held_back]


class _Recorded:
    """What ``_Session`` needs of a capture, where the graphs were found before."""

    def __init__(self, found: Found) -> None:
        self.handler: Handler | None = None
        self.found = [found]

    @property
    def current(self) -> Handler:
        assert self.handler is not None
        return self.handler
