"""Handlers for ``SiteInterpreter``: record samples and moments, or compute adapters and count what they keep."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.statistics import Sample
from rana_compile.types import RanaError, Site


def dense(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def flat_rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return x.reshape(-1, x.shape[-1])


class Recorder:
    """Runs sites densely. While ``sampling``: samples of inputs and, in the backward pass, of input gradients.

    Otherwise: second moments of the inputs, so that bases are fitted on other rows than those that price them.
    The model's parameters require no gradient, so autograd records only what follows the first sampled site.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.sampling = True
        self.samples: dict[Site, Sample] = {}
        self._moments: dict[Site, tuple[Tensor, int]] = {}
        self._capacity = capacity
        self._seed = seed

    def moment(self, site: Site) -> Tensor | None:
        """E[x xᵀ] [d_in, d_in] over the batches run without gradients, or None if there were none."""
        total, rows = self._moments.get(site, (None, 0))
        return None if total is None else total / rows

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        if not torch.isfinite(x).all():
            raise RanaError(
                f"{site.name}: its input holds NaN or infinity on calibration data; check the model and the data"
            )
        if not self.sampling:
            rows = flat_rows(x).float()
            total, seen = self._moments.get(site, (torch.zeros((), device=x.device), 0))
            self._moments[site] = (total + rows.t() @ rows, seen + len(rows))
            return dense(x, weights, biases)
        seed = self._seed + len(self.samples)
        sample = self.samples.setdefault(site, Sample(self._capacity, seed))
        taken, slots = sample.offer(flat_rows(x))
        if x.requires_grad:
            own = x.view_as(x)  # its gradient is this site's share alone
        else:
            own = x.detach().requires_grad_()  # the first site: gradients start here
        own.register_hook(lambda u: sample.offer_gradient(flat_rows(u), taken, slots))
        return dense(own, weights, biases)


class Adapted:
    """Runs sites through their adapters (dense where none is given) and measures what survives.

    ``tensors`` are what the plan stores; what derives from the weights is computed at first use.
    """

    def __init__(self, adapters: Mapping[Site, tuple[str, Tensors]], samples: Mapping[Site, Sample] | None = None):
        self._adapters = adapters
        self._samples = samples or {}
        self._derived: dict[Site, Tensors] = {}
        self.live: dict[Site, float] = {site: 0.0 for site in adapters}
        self.rows: dict[Site, int] = {site: 0 for site in adapters}

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        if site in self._samples:
            self._samples[site].offer(flat_rows(x))
        if site not in self._adapters:
            return dense(x, weights, biases)
        name, tensors = self._adapters[site]
        family = FAMILIES[name]
        if site not in self._derived:
            self._derived[site] = family.derive(weights, tensors)
        tensors = tensors | self._derived[site]
        if "threshold" in tensors:
            z = flat_rows(family.coordinates(x, tensors))
            self.live[site] += float((z.abs() >= tensors["threshold"]).sum())
            self.rows[site] += z.shape[0]
        return family.forward(x, weights, biases, tensors)

    def mean_live(self, site: Site) -> float:
        """Mean coordinates kept per token at a site with thresholds."""
        return self.live[site] / max(self.rows[site], 1)
