"""Options a user may pass, checked once: an unknown or contradictory one is an error that names the known ones."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rana_compile.types import ConfigError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class BackendOptions:
    """Options of ``torch.compile(model, backend="rana", options={...})``.

    Attributes:
        plan: a ``Plan`` or the path of a saved one. Required.
        prefill: ``"adapted"`` computes every token with its masks, so that a forward pass over text
            measures what decode computes; ``"dense"`` leaves graphs of more than one row dense.
        mode: passed on to Inductor (``"default"``, ``"reduce-overhead"``, ``"max-autotune"``, ...).
        inductor: further Inductor options, as ``torch.compile(options=...)`` would take them.
    """

    plan: Any
    prefill: Literal["adapted", "dense"] = "adapted"
    mode: str | None = None
    inductor: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> "BackendOptions":
        """Check what torch.compile handed over. Raises ConfigError naming what is wrong."""
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(known)}")
        if given.get("plan") is None:
            raise ConfigError(
                'backend "rana" needs options={"plan": plan}: a Plan from rana_compile.calibrate(model, batches) '
                "or the path of a saved one"
            )
        if mode is not None and given.get("mode") not in (None, mode):
            raise ConfigError(f"mode={mode!r} contradicts options['mode']={given['mode']!r}; give one of them")
        given["mode"] = given.get("mode") or mode
        parsed = cls(**given)
        parsed._check()
        return parsed

    def _check(self) -> None:
        if self.mode not in (None, *MODES):
            raise ConfigError(f"mode {self.mode!r} is not one of Inductor's; known modes: {', '.join(MODES)}")
        if self.prefill not in ("adapted", "dense"):
            raise ConfigError(f"option 'prefill' is {self.prefill!r}; expected 'adapted' or 'dense'")
        if self.inductor is not None and not isinstance(self.inductor, Mapping):
            raise ConfigError(f"option 'inductor' is a {type(self.inductor).__name__}; expected a dict")
