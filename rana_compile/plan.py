"""A plan: which adapter each site gets, fitted tensors included. Portable, versioned, one safetensors file.

Bound to a model by parameter names, shapes and a hash of the weights; nothing in the file is code.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rana_compile import documents
from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.documents import weight_hash
from rana_compile.files import replacing
from rana_compile.flops import dense_flops, total_dense_flops
from rana_compile.offload import Weights
from rana_compile.types import ConfigError, PlanError, Site, Skipped

if TYPE_CHECKING:
    from rana_compile.picture import Observed, Point

FORMAT = 2
IN_DIRECTORY = "rana_plan.safetensors"  # the name of a plan that lies in a model's directory
_KEY = "rana_compile"


@dataclass(frozen=True, eq=False)
class SitePlan:
    """The adapter of one site.

    Attributes:
        family: ``dense`` or a name in ``rana_compile.adapters.FAMILIES``.
        tensors: what the family stores.
        live: mean coordinates kept per token by each mask, measured on held-back tokens.
        flops_kept: realised FLOPs as a share of the site's dense FLOPs.
        error: predicted part in the divergence from the dense model (KL, nats per token), corrected by what each kind
            of adapter measured and by what learning thresholds gained.
        weight_hash: SHA-256 over dtype, shape and bytes of the site's weights.
    """

    site: Site
    family: str
    tensors: Tensors
    live: tuple[float, ...]
    flops_kept: float
    error: float
    weight_hash: str

    def check(self, weights: Sequence[Tensor], values: bool = True) -> None:
        """Raises PlanError unless these are the weights that the site was fitted on, in the same dtype.

        Without ``values`` only their shapes are compared: they were trained since.
        """
        expected = [(d_out, self.site.d_in)[:: -1 if self.site.transposed else 1] for d_out in self.site.d_outs]
        found = [tuple(w.shape) for w in weights]
        if found != expected:
            raise PlanError(
                f"{self.site.name}: the plan was fitted on weights of shapes {expected}, this model has {found}; "
                "calibrate this model"
            )
        if values and weight_hash(weights) != self.weight_hash:
            raise PlanError(
                f"{self.site.name}: the weights are not those the plan was fitted on (values or dtype differ, now "
                f"{weights[0].dtype}); calibrate this model, load the weights of the plan, or, if the model was "
                "trained since, use check_weights=False"
            )


@dataclass(frozen=True, eq=False)
class Plan:
    """Adapters for a whole model, as ``rana_compile.calibrate`` fits them.

    Attributes:
        sites: every included site, dense ones too.
        skipped: linears left alone, and MLPs matched only as their linears, with the reason.
        flops_asked: the budget, as a share of the dense FLOPs of the included sites.
        model_flops: dense FLOPs per token of every linear of the model, excluded ones included.
        info: provenance for readers (recipe, seed, dtype, tokens, versions, measured losses).
    """

    sites: tuple[SitePlan, ...]
    skipped: tuple[Skipped, ...]
    flops_asked: float
    model_flops: float
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def flops_kept(self) -> float:
        """Realised FLOPs per token as a share of the dense FLOPs of the included sites."""
        return self._kept() / max(total_dense_flops(s.site for s in self.sites), 1)

    @property
    def flops_kept_model(self) -> float:
        """Realised FLOPs per token as a share of every linear of the model (excluded ones count as kept)."""
        included = total_dense_flops(s.site for s in self.sites)
        return (self._kept() + self.model_flops - included) / max(self.model_flops, 1)

    def _kept(self) -> float:
        return sum(s.flops_kept * dense_flops(s.site) for s in self.sites)

    @property
    def loss_increase(self) -> float | None:
        """Predicted for the next tokens of text like that calibrated on, nats per token; from held-back batches.

        It is not the divergence, which ``max_loss_increase`` limits: the text's own words may suit the adapted model
        better or worse than words that the dense model would write. None unless ``calibrate`` or ``refit`` fitted a
        causal language model of transformers on token ids, and in plans of earlier versions.
        """
        return self.info.get("loss_increase")

    @property
    def adapted(self) -> tuple[SitePlan, ...]:
        return tuple(s for s in self.sites if s.family != "dense")

    @property
    def dead(self) -> tuple[SitePlan, ...]:
        """Adapted sites with a mask that no held-back token switched on: they add nothing, and no gradient passes."""
        return tuple(s for s in self.adapted if 0 in s.live)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as one safetensors file; an existing file stays intact until the new one is whole.

        Raises WriteError, an OSError too, where the disk is full or the place cannot be written.
        """
        documents.save(path, _KEY, self.as_dict(), self._tensors())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the plan into a model's directory, beside its weights, where ``from_pretrained`` finds it."""
        self.save(Path(directory) / IN_DIRECTORY)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        points: "Sequence[Point]" = (),
        observed: "Observed | None" = None,
    ) -> None:
        """Write one self-contained HTML page about the plan, to be opened in any browser, without a network.

        Args:
            path: the file; an existing one is replaced.
            points: what was measured of this and other plans or methods, for the plot of quality against cost
                (``rana_compile.page.read_points`` reads those of ``rana-compile sweep`` and of a table).
            observed: what the plan does on some text (``rana_compile.observe``): live shares token by token.

        Raises RanaError if matplotlib is missing.
        """
        from rana_compile.page import page_of

        page = page_of(self, points, observed)
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def digest(self) -> str:
        """SHA-256 over all that the plan's file would hold: the same for equal plans."""
        return documents.checksum(self.as_dict(), self._tensors())

    def _tensors(self) -> Tensors:
        return {f"{i}.{k}": t for i, s in enumerate(self.sites) for k, t in s.tensors.items()}

    def as_dict(self) -> dict[str, Any]:
        """The plan without its tensors, as JSON can hold it."""
        own = ("family", "live", "flops_kept", "error", "weight_hash")
        sites = [{k: getattr(s, k) for k in own} | asdict(s.site) for s in self.sites]
        return {
            "format": FORMAT,
            "flops_asked": self.flops_asked,
            "model_flops": self.model_flops,
            "info": dict(self.info),
            "sites": sites,
            "skipped": [asdict(s) for s in self.skipped],
        }

    def check(self, model: torch.nn.Module, values: bool = True) -> None:
        """Raises PlanError unless the plan was fitted on this model: parameter names, shapes, dtypes and values.

        Without ``values`` the weights may have been trained since.
        """
        parameters = Weights(model)
        for entry in self.sites:
            if missing := [name for name in entry.site.weights if name not in parameters]:
                raise PlanError(f"the plan is for another model: this one has no parameter {missing[0]!r}")
            entry.check([parameters[name] for name in entry.site.weights], values)

    @classmethod
    def of(cls, plan: Any) -> "Plan":
        """The plan itself, or the one saved at a path or in a model's directory, read once while it does not change.

        Raises ConfigError if it is neither, PlanError as ``load`` does.
        """
        if isinstance(plan, cls):
            return plan
        if not isinstance(plan, str | os.PathLike):
            raise ConfigError(f"the plan is a {type(plan).__name__}; expected a rana_compile.Plan or a path")
        path = _file_of(plan)
        state = path.stat() if path.exists() else None
        return _load_once(str(path), (state.st_ino, state.st_mtime_ns, state.st_size) if state else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan from a file or a model's directory. Raises PlanError if it is missing, damaged, or newer."""
        path = _file_of(path)
        try:
            document, tensors = documents.load(path, _KEY)
        except FileNotFoundError:
            raise PlanError(f"no plan at {str(path)!r}; save one with plan.save(path)") from None
        except (OSError, ValueError) as error:
            raise PlanError(f"{str(path)!r} is not a readable plan ({error}); calibrate again and save anew") from error
        if (version := document.get("format")) != FORMAT:
            raise PlanError(
                f"{str(path)!r} has format {version!r:.20}; this version reads {FORMAT}: calibrate again, or use the "
                "version of rana_compile that wrote it"
            )
        try:
            documents.check(document, tensors)
            return _from_document(document, tensors)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise PlanError(f"{str(path)!r} is damaged ({reason}); calibrate again and save anew") from error

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> "Plan":
        """The plan in a model's directory, or in a repository of the hub, as ``save_pretrained`` put it there.

        Raises PlanError as ``load`` does, or if the hub has none or cannot be reached.
        """
        if Path(name).exists():
            return cls.load(name)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return cls.load(hf_hub_download(str(name), IN_DIRECTORY))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise PlanError(
                f"no directory {str(name)!r}, and no {IN_DIRECTORY} under that name on the hub: {error}"
            ) from error

    def __str__(self) -> str:
        from rana_compile.report import plan_text

        return plan_text(self)


def _file_of(path: str | os.PathLike[str]) -> Path:
    """The plan's own file where a directory is meant."""
    return Path(path) / IN_DIRECTORY if Path(path).is_dir() else Path(path)


@lru_cache(maxsize=8)
def _load_once(path: str, version: tuple[int, int, int] | None) -> Plan:
    return Plan.load(path)


def _from_document(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    info, sites, skipped = (_of_kind(document, name, kind) for name, kind in _PARTS.items())
    return Plan(
        sites=tuple(_site_plan(entry, i, tensors) for i, entry in enumerate(sites)),
        skipped=tuple(Skipped(str(entry["name"]), str(entry["reason"])) for entry in skipped),
        flops_asked=_number(document, "flops_asked"),
        model_flops=_number(document, "model_flops"),
        info=info,
    )


_PARTS = {"info": dict, "sites": list, "skipped": list}


def _of_kind(document: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(document[name], kind):
        raise ValueError(f"{name!r} is a {type(document[name]).__name__}, not a {kind.__name__}")
    return document[name]


def _number(document: Mapping[str, Any], name: str) -> float:
    """What cannot be negative."""
    value = float(document[name])
    if not 0 <= value < math.inf:
        raise ValueError(f"{name!r} is {value}")
    return value


def _site_plan(entry: Mapping[str, Any], index: int, tensors: Mapping[str, Tensor]) -> SitePlan:
    site, name = Site.of(entry), entry["family"]
    if name != "dense" and name not in FAMILIES:
        raise ValueError(f"{site.name}: no family is called {name!r:.40}; known: {', '.join(FAMILIES)}")
    stored = FAMILIES[name].stored if name != "dense" else ()
    plan = SitePlan(
        site=site,
        family=name,
        tensors={k: tensors[f"{index}.{k}"] for k in stored},
        live=tuple(_number({"live": n}, "live") for n in entry["live"]),
        flops_kept=_number(entry, "flops_kept"),
        error=float(entry["error"]),
        weight_hash=str(entry["weight_hash"]),
    )
    if stored:
        _check_tensors(plan)
    return plan


def _check_tensors(plan: SitePlan) -> None:
    """Raises ValueError unless the tensors are such as the family stores for the site."""
    family, site = FAMILIES[plan.family], plan.site
    if len(plan.live) != len(family.mask_flops(site)):
        raise ValueError(f"{site.name}: {len(plan.live)} masks; a {plan.family} adapter has another number there")
    for name, expected in family.shapes(site, plan.tensors).items():
        t = plan.tensors[name]
        if tuple(t.shape) != expected or not t.is_floating_point() or t.isnan().any():
            raise ValueError(
                f"{site.name}: {name!r} is a {t.dtype} tensor of shape {tuple(t.shape)}; expected floating-point "
                f"numbers of shape {expected}, none of them NaN"
            )
