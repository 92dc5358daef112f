"""Options a user may pass, checked once: an unknown or contradictory one is an error that names the known ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from rana_compile.types import ConfigError

MIN_FEATURES = 32
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class BackendOptions:
    """Options of ``torch.compile(model, backend="rana", options={...})``.

    Attributes:
        plan: a ``Plan``, the path of a saved one or a directory that holds one. None: the backend calibrates itself on
            the first calls' inputs.
        prefill: ``"adapted"`` computes every token with its masks, so that a forward pass over text
            measures what decode computes; ``"dense"`` leaves graphs of more than 16 rows dense, and of 2 to 16 where no
            kernel is faster.
        include, exclude: glob patterns over parameter names, as ``calibrate`` takes them.
        min_features: a linear with fewer inputs or outputs stays dense (a mixture's router, a small classifier). By
            default 32 where the backend calibrates itself, and 0 with a plan, which chose its sites already.
        free_dense_weights: after the first decoded token the weights of neuron and gated sites become views of the
            layout that the kernels read, so that there is one copy of them, not two. Values stay; strides change, so
            every graph is compiled once more. Saving them then needs ``contiguous()`` copies. Rank adapters keep both.
        check_weights: with a plan, refuse weights that are not those it was fitted on. False: they were trained since
            (a run that is resumed); ``rana_compile.refit`` fits the thresholds to them.
        mode: passed on to Inductor (``"default"``, ``"reduce-overhead"``, ``"max-autotune"``, ...).
        inductor: further Inductor options, as ``torch.compile(options=...)`` would take them. Adapted graphs
            without gradients have ``size_asserts`` off where Dynamo's guards hold their inputs' sizes (not
            symbolic ones after a calibration of their own; those of ops' outputs are not asserted either), unless it is
            set here.
        compiler: the backend that compiles the rewritten graph; ``"aot_eager"`` or ``"eager"`` to look for an error.
        flops_budget, recipe: without a plan, as ``calibrate`` takes them.
        calibration_tokens: without a plan, tokens to see before the fit.
        max_divergence: without a plan, the most that the adapted outputs may diverge from the dense ones on inputs
            held back from the fit: mean KL divergence in nats where the model ends in a linear (logits), else relative
            error. Above it the model stays dense.
    """

    plan: Any = None
    prefill: Literal["adapted", "dense"] = "adapted"
    include: Patterns = None
    exclude: Patterns = None
    min_features: int | None = None
    free_dense_weights: bool = False
    check_weights: bool = True
    mode: str | None = None
    inductor: Mapping[str, Any] | None = None
    compiler: str = "inductor"
    flops_budget: float = 0.7
    recipe: str = "auto"
    calibration_tokens: int = 8192
    max_divergence: float = 0.3

    @property
    def least_features(self) -> int:
        """``min_features``, or its default."""
        if self.min_features is not None:
            return self.min_features
        return MIN_FEATURES if self.plan is None else 0

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> "BackendOptions":
        """Check what torch.compile handed over. Raises ConfigError naming what is wrong."""
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"unknown option {', '.join(map(repr, unknown))}; known options: {', '.join(known)}")
        if mode is not None and given.get("mode") not in (None, mode):
            raise ConfigError(f"mode={mode!r} contradicts options['mode']={given['mode']!r}; give one of them")
        given["mode"] = given.get("mode") or mode
        parsed = cls(**given)
        parsed._check()
        if parsed.plan is not None and (fitting := sorted(set(given) & _FITTING)):
            raise ConfigError(
                f"option {', '.join(map(repr, fitting))} is for calibration without a plan, and a plan is given; "
                "leave one of them out"
            )
        return parsed

    def _check(self) -> None:
        if self.mode not in (None, *MODES):
            raise ConfigError(f"mode {self.mode!r} is not one of Inductor's; known modes: {', '.join(MODES)}")
        if self.prefill not in ("adapted", "dense"):
            raise ConfigError(f"option 'prefill' is {self.prefill!r}; expected 'adapted' or 'dense'")
        for name in ("free_dense_weights", "check_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"option {name!r} is {getattr(self, name)!r}; expected True or False")
        if self.inductor is not None and not isinstance(self.inductor, Mapping):
            raise ConfigError(f"option 'inductor' is a {type(self.inductor).__name__}; expected a dict")
        for name, least in {"min_features": 0, "calibration_tokens": 1, "max_divergence": 0}.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and value >= least
            if not number and not (name == "min_features" and value is None):
                raise ConfigError(f"option {name!r} is {value!r}; expected a number of at least {least}")


_FITTING = {"flops_budget", "recipe", "calibration_tokens", "max_divergence"}  # they shape a plan
