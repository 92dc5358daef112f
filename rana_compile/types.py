"""The portable vocabulary: what is true of a model and may be saved, without graphs or tensors.

A ``Site`` is the unit of allocation: one linear map of one input, made of one weight or of several
stacked along the output (q/k/v, gate/up). A ``Match`` (``rana_compile.passes``) is the same site in one live graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

SiteKind = Literal["linear", "stacked", "gate_up", "gate", "up", "down"]


class RanaError(Exception):
    """Base of every error raised on purpose: the message says what, what was expected and what to do."""


class ConfigError(RanaError, ValueError):
    """An option, argument or input is not acceptable."""


class PlanError(RanaError):
    """A plan cannot be read, or does not belong to this model."""


class WriteError(RanaError, OSError):
    """A file cannot be written; one that was there before is untouched."""


class OutOfMemoryError(RanaError, MemoryError):
    """There is too little memory, of the device or of the machine; the message says what needs less."""


@dataclass(frozen=True)
class Site:
    """One adaptable linear map ``y = W x + b``.

    Attributes:
        name: what the report calls it, e.g. ``model.layers.0.self_attn.{q,k,v}_proj``.
        kind: its role; ``gate_up`` (or ``gate``), ``up`` and ``down`` belong to a matched MLP.
        weights: parameter names as in ``model.state_dict()``, stacked in this order.
        d_in: input features.
        d_outs: output features of each weight.
        block: the MLP it belongs to (a module name), or None.
        transposed: whether the parameters are stored [d_in, d_out], as GPT-2's Conv1D does.
        activation: the function between gate and product of a ``gate_up``, where the kernels know it.
    """

    name: str
    kind: SiteKind
    weights: tuple[str, ...]
    d_in: int
    d_outs: tuple[int, ...]
    block: str | None = None
    transposed: bool = False
    activation: str | None = None

    @property
    def d_out(self) -> int:
        return sum(self.d_outs)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Site":
        """The site that ``asdict`` made this of, after a way through JSON.

        Raises KeyError if a field is missing, ValueError if one cannot be true of any site.
        """
        given: dict[str, Any] = {f.name: document[f.name] for f in fields(cls)}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        site = cls(**values)
        possible = {
            "name": isinstance(site.name, str),
            "kind": site.kind in get_args(SiteKind),
            "weights": _is_tuple_of(str, site.weights),
            "d_in": type(site.d_in) is int and site.d_in > 0,
            "d_outs": _is_tuple_of(int, site.d_outs) and min(site.d_outs) > 0 and len(site.d_outs) == len(site.weights),
            "block": isinstance(site.block, str | None),
            "transposed": isinstance(site.transposed, bool),
            "activation": isinstance(site.activation, str | None),
        }
        for field, is_possible in possible.items():
            if not is_possible:
                raise ValueError(f"of a site {field!r} cannot be {given[field]!r:.100}")
        return site

    def oriented(self, parameters: "Sequence[Tensor]") -> "list[Tensor]":
        """The site's parameters as W [d_out_i, d_in], however they are stored (views)."""
        return [p.t() for p in parameters] if self.transposed else list(parameters)


def _is_tuple_of(kind: type, values: Any) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(type(value) is kind for value in values)


@dataclass(frozen=True)
class Skipped:
    """A linear, stack or MLP that was not adapted (or not matched as the larger pattern), and why."""

    name: str
    reason: str


def matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter name matches a glob, or a dotted part of it does (``lm_head``, ``layers.*.o_proj``)."""
    dotted = f".{name}."
    return any(fnmatchcase(name, p) or fnmatchcase(dotted, f"*.{p}.*") for p in patterns)


def common_name(names: tuple[str, ...]) -> str:
    """One readable name for stacked weights: a.{q,k,v}_proj from a.q_proj.weight, a.k_proj.weight, ..."""
    modules = [n.rpartition(".")[0] or n for n in names]
    if len(set(modules)) == 1:
        return modules[0]
    prefix, suffix = _shared_prefix(modules), _shared_prefix([m[::-1] for m in modules])[::-1]
    shortest = min(len(m) for m in modules)
    suffix = suffix[max(0, len(prefix) + len(suffix) - shortest) :]
    middles = ",".join(m[len(prefix) : len(m) - len(suffix)] for m in modules)
    return f"{prefix}{{{middles}}}{suffix}"


def _shared_prefix(words: list[str]) -> str:
    first, last = min(words), max(words)
    return next((first[:i] for i, c in enumerate(first) if i >= len(last) or c != last[i]), first)


def parameter_filter(
    include: str | Sequence[str] | None, exclude: str | Sequence[str] | None, names: Sequence[str]
) -> Callable[[str], str | None]:
    """A function from a parameter's name to the reason it is left out, or None.

    Raises ConfigError for a pattern that matches no parameter: it is a misspelling.
    """
    included, excluded = _patterns("include", include, names), _patterns("exclude", exclude, names)

    def reason(name: str) -> str | None:
        if included and not matches_any(name, included):
            return f"not included by {', '.join(included)}"
        return f"excluded by {', '.join(excluded)}" if excluded and matches_any(name, excluded) else None

    return reason


def _patterns(option: str, given: str | Sequence[str] | None, names: Sequence[str]) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given or ())
    for pattern in patterns:
        if not any(matches_any(name, (pattern,)) for name in names):
            example = next((n for n in reversed(names) if n.endswith("weight")), "lm_head.weight")
            raise ConfigError(f"{option}={pattern!r} matches no parameter; names look like {example!r}")
    return patterns
