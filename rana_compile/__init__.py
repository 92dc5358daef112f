"""``torch.compile(model, backend="rana")``: compute, token by token, only the ranks and neurons that matter.

plan = rana_compile.calibrate(model, batches, flops_budget=0.6)
model.compile(backend="rana", options={"plan": plan})
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rana_compile.calibration import calibrate as calibrate
    from rana_compile.calibration import refit as refit
    from rana_compile.evaluation import adapted as adapted
    from rana_compile.evaluation import measure_cost as measure_cost
    from rana_compile.exporting import Exportable as Exportable
    from rana_compile.observation import observe as observe
    from rana_compile.outlook import explain as explain
    from rana_compile.plan import Plan as Plan
    from rana_compile.sampling import own_text as own_text
    from rana_compile.self_calibration import plan_of as plan_of
    from rana_compile.types import ConfigError as ConfigError
    from rana_compile.types import OutOfMemoryError as OutOfMemoryError
    from rana_compile.types import PlanError as PlanError
    from rana_compile.types import RanaError as RanaError
    from rana_compile.types import WriteError as WriteError

_WHERE = {
    "Plan": "plan",
    "calibrate": "calibration",
    "refit": "calibration",
    "measure_cost": "evaluation",
    "adapted": "evaluation",
    "explain": "outlook",
    "Exportable": "exporting",
    "observe": "observation",
    "own_text": "sampling",
    "plan_of": "self_calibration",
    "ConfigError": "types",
    "OutOfMemoryError": "types",
    "PlanError": "types",
    "RanaError": "types",
    "WriteError": "types",
}
__all__ = [
    "ConfigError",
    "Exportable",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "RanaError",
    "WriteError",
    "adapted",
    "calibrate",
    "explain",
    "measure_cost",
    "observe",
    "own_text",
    "plan_of",
    "refit",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
