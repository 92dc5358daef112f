"""Handlers for ``SiteInterpreter``: record samples and moments, or compute adapters and count what they keep."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.flops import dense_flops
from rana_compile.statistics import LogHistogram, Sample
from rana_compile.types import RanaError, Site


def dense(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def dense_handler(
    site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The handler that changes nothing."""
    return dense(x, weights, biases)


def flat_rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return x.reshape(-1, x.shape[-1])


class Recorder:
    """Runs sites densely and samples inputs and, in the backward pass, input gradients.

    While ``basis_rows`` is set, rows also count towards the second moments that bases are fitted on; the others stay
    fresh, to price those bases. The model's parameters require no gradient, so autograd records only what follows the
    first site.
    """

    def __init__(self, capacity: Callable[[], int], seed: int) -> None:
        self.basis_rows = False
        self.samples: dict[Site, Sample] = {}
        self._moments: dict[Site, tuple[Tensor, int]] = {}
        self._capacity = capacity
        self._seed = seed

    def moment(self, site: Site) -> Tensor | None:
        """E[x xᵀ] [d_in, d_in] over the rows that bases are fitted on, or None if there were none."""
        total, rows = self._moments.get(site, (None, 0))
        return None if total is None else total / rows

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        if not torch.isfinite(x).all():
            raise RanaError(
                f"{site.name}: its input holds NaN or infinity on calibration data; check the model and the data"
            )
        if self.basis_rows:
            rows = flat_rows(x).detach().float()
            total, seen = self._moments.get(site, (torch.zeros((), device=x.device), 0))
            with torch.autocast(x.device.type, enabled=False):
                self._moments[site] = (total + rows.t() @ rows, seen + len(rows))
        seed = self._seed + len(self.samples)
        if site not in self.samples:
            self.samples[site] = Sample(self._capacity(), seed)
        sample = self.samples[site]
        taken, slots = sample.offer(flat_rows(x), fresh=not self.basis_rows)
        if x.requires_grad:
            own = x.view_as(x)  # its gradient is this site's share alone
        else:
            own = x.detach().requires_grad_()  # the first site: gradients start here
        own.register_hook(lambda u: sample.offer_gradient(flat_rows(u), taken, slots))
        return dense(own, weights, biases)


class Adapted:
    """Runs sites through their adapters (dense where none is given) and measures what survives.

    Args:
        adapters: family and stored tensors of each site; what derives from the weights is computed at first use.
        targets: mean live coordinates wanted at a site: its thresholds are scaled, from batch to batch, so that
            this many survive on the inputs seen so far, which come from sites already scaled.
    """

    def __init__(self, adapters: Mapping[Site, tuple[str, Tensors]], targets: Mapping[Site, float] | None = None):
        self._adapters = adapters
        self._targets = targets or {}
        self._tensors: dict[Site, Tensors] = {}
        self._histograms = {site: LogHistogram() for site in self._targets}
        self.scale: dict[Site, float] = {}
        self._live = dict.fromkeys(adapters, 0)
        self._rows = dict.fromkeys(adapters, 0)

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        if site not in self._adapters:
            return dense(x, weights, biases)
        name, stored = self._adapters[site]
        family = FAMILIES[name]
        if site not in self._tensors:
            stored = {k: t.to(x.device) for k, t in stored.items()}
            with torch.autocast(x.device.type, enabled=False):
                self._tensors[site] = stored | family.derive(weights, stored)
        tensors = self._tensors[site]
        if "threshold" in tensors:
            z = flat_rows(family.coordinates(x, tensors)).abs()
            if site in self._targets:
                tensors = tensors | {"threshold": tensors["threshold"] * self._rescaled(site, z / tensors["threshold"])}
            self._live[site] += int((z >= tensors["threshold"]).sum())
            self._rows[site] += len(z)
        return family.forward(x, weights, biases, tensors)

    def _rescaled(self, site: Site, ratio: Tensor) -> float:
        self._histograms[site].add(ratio)
        self.scale[site] = self._histograms[site].level(self._targets[site] / ratio.shape[1])
        return self.scale[site]

    def live(self, site: Site) -> float:
        """Mean coordinates kept per token at an adapted site."""
        _, stored = self._adapters[site]
        if "threshold" not in stored:
            return float(stored["output_basis"].shape[1])
        return self._live[site] / max(self._rows[site], 1)

    def flops(self, site: Site) -> float:
        """Realised FLOPs per token of a site, adapted or dense."""
        if site not in self._adapters:
            return dense_flops(site)
        name, stored = self._adapters[site]
        return FAMILIES[name].flops(site, self.live(site), stored)
