"""Handlers for ``SiteInterpreter``: record samples and moments, or compute adapters and count what they keep."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors, adapter_flops
from rana_compile.flops import dense_flops
from rana_compile.processes import ALONE, Processes
from rana_compile.statistics import LogHistogram, Sample
from rana_compile.types import RanaError, Site


def dense(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return _linears([x] * len(weights), weights, biases)


def _linears(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))


def dense_handler(
    site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The handler that changes nothing."""
    return dense(x, weights, biases)


def flat_rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]."""
    return x.reshape(-1, x.shape[-1])


def every_site(site: Site) -> bool:
    return True


class Recorder:
    """Runs sites densely and samples inputs and, in the backward pass, input gradients of each linear.

    While ``basis_rows`` is set, rows also count towards the second moments that bases are fitted on; the others stay
    fresh, to price those bases. The model's parameters require no gradient, so autograd records only what follows the
    first site. All sites draw the same rows, so that those of an MLP's sites belong together.

    A second moment takes 4 d_in² bytes, at a 7B model's ``down_proj`` half a gigabyte: ``has_moment`` says which sites
    need one.
    """

    def __init__(self, capacity: Callable[[], int], seed: int, has_moment: Callable[[Site], bool] = every_site) -> None:
        self.basis_rows = False
        self.has_moment = has_moment
        self.samples: dict[Site, Sample] = {}
        self.moments: dict[Site, tuple[Tensor, int]] = {}
        self._capacity = capacity
        self._seed = seed

    def moment(self, site: Site) -> Tensor | None:
        """E[x xᵀ] [d_in, d_in] over the rows that bases are fitted on, or None if there were none; after ``gather``."""
        return self.moments.get(site, (None, 0))[0]

    def gather(self, processes: Processes) -> None:
        """Put together what all processes recorded; moments become means in place, since a second copy is gigabytes."""
        self.samples = {site: sample.gather(processes) for site, sample in self.samples.items()}
        for site, (total, rows) in self.moments.items():
            self.moments[site] = processes.sum(total).div_(int(processes.total(rows)[0])), 1

    def __call__(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        rows = flat_rows(x.detach())  # what autograd keeps, it expects of ``again`` too
        if not torch.isfinite(rows).all():
            raise RanaError(
                f"{site.name}: its input holds NaN or infinity on calibration data; check the model and the data"
            )
        if self.basis_rows and self.has_moment(site):
            total, seen = self.moments.get(site, (torch.zeros((), device=x.device), 0))
            wide = rows.float()
            with torch.autocast(x.device.type, enabled=False):
                self.moments[site] = (total + wide.t() @ wide, seen + len(rows))
        if site not in self.samples:
            self.samples[site] = Sample(self._capacity(), len(weights), self._seed)
        sample = self.samples[site]
        taken, slots = sample.offer(rows, fresh=not self.basis_rows)

        def keep(part: int) -> Callable[[Tensor], None]:
            return lambda u: sample.offer_gradient(part, flat_rows(u), taken, slots)

        inputs = [_own(x) for _ in weights]
        for part, own in enumerate(inputs):
            own.register_hook(keep(part))
        return _linears(inputs, weights, biases)

    def again(
        self, site: Site, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The same outputs, with nothing recorded."""
        return _linears([_own(x) for _ in weights], weights, biases)


def _own(x: Tensor) -> Tensor:
    """One linear's input, so that its gradient is this linear's share alone; at the first site gradients start."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


class Adapted:
    """Runs sites through their adapters (dense where none is given) and measures what survives.

    Args:
        adapters: family and stored tensors of each site; what derives from the weights is computed at first use.
        targets: mean live coordinates wanted of each mask of a site: its thresholds are scaled, from batch to batch,
            so that this many survive on the inputs seen so far, which come from sites already scaled.
        processes: whose inputs count; all of them run the same sites.
    """

    def __init__(
        self,
        adapters: Mapping[Site, tuple[str, Tensors]],
        targets: Mapping[Site, Sequence[float]] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._adapters = adapters
        self._targets = targets or {}
        self._tensors: dict[Site, Tensors] = {}
        self._histograms = {site: [LogHistogram(processes) for _ in wanted] for site, wanted in self._targets.items()}
        self.scale = {site: [1.0] * len(wanted) for site, wanted in self._targets.items()}
        self._live: dict[Site, list[float]] = {
            site: [0] * len(FAMILIES[name].mask_flops(site)) for site, (name, _) in adapters.items()
        }
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
        for i in range(len(self._live[site])):
            mask = family.mask(i, site, x, weights, biases, tensors)
            z, threshold = flat_rows(mask.z).abs(), mask.threshold
            if site in self._targets:
                factor = self._rescaled(site, i, z / threshold)
                tensors, threshold = family.scaled(tensors, i, factor), threshold * factor
            self._live[site][i] += self.count(site, i, z < threshold)
        self._rows[site] += x.numel() // x.shape[-1]
        return family.forward(site, x, weights, biases, tensors)

    def count(self, site: Site, index: int, dead: Tensor) -> int:
        """Coordinates that survive one mask; ``dead`` [rows, n] says which do not."""
        return dead.numel() - int(dead.count_nonzero())

    def _rescaled(self, site: Site, index: int, ratio: Tensor) -> float:
        histogram = self._histograms[site][index]
        histogram.add(ratio)
        self.scale[site][index] = histogram.level(min(1.0, self._targets[site][index] / ratio.shape[1]))
        return self.scale[site][index]

    def live(self, site: Site) -> tuple[float, ...]:
        """Mean coordinates kept per token by each mask of an adapted site."""
        rows, *live = self._processes.total(self._rows[site], *self._live[site])
        return tuple(n / max(rows, 1) for n in live)

    def assume(self, live: Mapping[Site, Sequence[float]]) -> None:
        """Take these counts for sites that no row reached, as an encoder's on calls that only decode."""
        for site, each in live.items():
            if site in self._rows and not self._processes.total(self._rows[site])[0]:
                self._live[site], self._rows[site] = list(each), 1

    def flops(self, site: Site) -> float:
        """Realised FLOPs per token of a site, adapted or dense."""
        if site not in self._adapters:
            return dense_flops(site)
        name, stored = self._adapters[site]
        return adapter_flops(FAMILIES[name], site, self.live(site), stored)
