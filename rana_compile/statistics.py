"""What calibration remembers of a site: bounded samples and histograms, never all activations.

``u = Wᵀ ∂loss/∂y`` is the gradient at the site's input through this site alone. With it the effect of
dropping coordinates D of x on the loss is ``g·δ = -Σ_{j∈D} u_j x_j``, without storing the (wider) g.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rana_compile.processes import ALONE, Processes

FLOAT8_MAX = torch.finfo(torch.float8_e5m2).max


@dataclass
class Sample:
    """A uniform reservoir of token rows of one site (Vitter 1985), deterministic for a seed.

    Samples of one seed and capacity that were offered as many rows keep the same ones.

    Attributes:
        capacity: most rows kept.
        parts: linears of the site.
        x: inputs [rows, d_in], bfloat16.
        u: input gradients of the summed loss through each linear [rows, parts, d_in], or None before a backward pass:
            float8_e5m2 in units of the first rows' size (read them with ``gradients``). Their two bits of mantissa are
            noise to sums over thousands of them, and twice the rows are worth more.
        fresh: whether a row [rows] was left out of the second moments, so that it may price a basis fitted on them.
        seen: rows offered so far.
    """

    capacity: int
    parts: int
    seed: int
    x: Tensor | None = None
    u: Tensor | None = None
    fresh: Tensor = field(init=False)
    seen: int = 0
    _unit: float = 1.0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.fresh = torch.ones(self.capacity, dtype=torch.bool)
        self._generator = torch.Generator().manual_seed(self.seed)

    def settings(self) -> dict[str, Any]:
        """What ``of`` needs beside ``tensors``, as JSON can hold it."""
        return {k: getattr(self, k) for k in ("capacity", "parts", "seed", "seen")} | {"unit": self._unit}

    def tensors(self) -> dict[str, Tensor]:
        """The sample's state, for a file."""
        kept = {"x": self.x, "u": self.u, "fresh": self.fresh, "draws": self._generator.get_state()}
        return {name: t for name, t in kept.items() if t is not None}

    @classmethod
    def of(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Sample":
        """The sample that these were taken from, which goes on as it would have. Raises KeyError if one is missing."""
        keys = ("capacity", "parts", "seed", "seen")
        sample = cls(**{k: settings[k] for k in keys}, x=tensors.get("x"), u=tensors.get("u"))
        sample.fresh, sample._unit = tensors["fresh"], settings["unit"]
        sample._generator.set_state(tensors["draws"])
        return sample

    def gather(self, processes: Processes) -> "Sample":
        """The rows of all processes, which were offered as many rows each, as one sample that is full."""
        if processes.count == 1:
            return self
        assert self.x is not None
        rows, n = self.rows, processes.count
        whole = Sample(rows * n, self.parts, self.seed, seen=self.seen * n)
        whole.x = torch.cat(processes.gathered(self.x[:rows]))
        whole.fresh = torch.cat(processes.gathered(self.fresh[:rows]))
        if self.u is not None:
            units = processes.gathered(torch.tensor(self._unit, dtype=torch.float64))
            whole._unit = float(units[0])
            parts = [
                (u.float() * (float(unit) / whole._unit)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(u.dtype)
                for u, unit in zip(processes.gathered(self.u[:rows]), units, strict=True)
            ]
            whole.u = torch.cat([part.view(torch.uint8) for part in parts]).view(self.u.dtype)
        return whole

    @property
    def rows(self) -> int:
        return min(self.seen, self.capacity)

    def same_rows(self, other: "Sample") -> bool:
        """Whether both kept the same rows."""
        mine, others = ((s.seed, s.capacity, s.seen) for s in (self, other))
        return mine == others

    def offer(self, x: Tensor, fresh: bool = True) -> tuple[Tensor, Tensor]:
        """Take rows of x [n, d_in] in; returns (rows of x taken, slots they went to) to pair gradients with."""
        taken, slots = self._draw(x.shape[0])
        if self.x is None:
            self.x = torch.zeros(self.capacity, x.shape[1], dtype=torch.bfloat16)
        self.x[slots] = x[taken].detach().to("cpu", torch.bfloat16)
        self.fresh[slots] = fresh
        return taken, slots

    def offer_gradient(self, part: int, u: Tensor, taken: Tensor, slots: Tensor) -> None:
        """The gradients through one linear of rows taken before: u [n, d_in]."""
        if self.u is None:
            self._unit = float(u.detach().float().square().mean().sqrt()) or 1.0
            self.u = torch.zeros(self.capacity, self.parts, u.shape[1], dtype=torch.float8_e5m2)
        rows = (u[taken].detach().float() / self._unit).clamp(-FLOAT8_MAX, FLOAT8_MAX)
        self.u.view(torch.uint8)[slots, part] = rows.to("cpu", torch.float8_e5m2).view(torch.uint8)

    def gradients(self, device: torch.device | str = "cpu") -> Tensor | None:
        """u [rows, parts, d_in] in float32, or None without gradients."""
        return None if self.u is None else self.u[: self.rows].to(device).float() * self._unit

    def _draw(self, n: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(self.seen, self.seen + n)
        slot = (torch.rand(n, generator=self._generator, dtype=torch.float64) * (position + 1)).long()
        slot = torch.where(position < self.capacity, position, slot)
        self.seen += n
        # a slot drawn twice in one batch belongs to the later row
        order = torch.arange(n)[slot < self.capacity]
        slots = slot[order]
        last = {int(s): int(i) for s, i in zip(slots, order, strict=True)}
        return torch.tensor(list(last.values()), dtype=torch.long), torch.tensor(list(last), dtype=torch.long)


class LogHistogram:
    """Quantiles of a stream of non-negative numbers from counts over their binary logarithms."""

    BINS, OCTAVES = 8192, 24

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._counts = torch.zeros(self.BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Values [...]; infinity and NaN count as the largest, zero as the smallest."""
        logs = values.float().log2().nan_to_num(self.OCTAVES).clamp(-self.OCTAVES, self.OCTAVES)
        self._counts += torch.histc(logs, self.BINS, -self.OCTAVES, self.OCTAVES).double().cpu()

    def level(self, share: float) -> float:
        """The number that leaves this share of all processes' values at or above it (linear within a bin)."""
        counts = self._processes.sum(self._counts)
        above = counts.flip(0).cumsum(0)
        wanted = share * float(above[-1])
        i = min(int(torch.searchsorted(above, wanted)), self.BINS - 1)
        inside = float(counts[self.BINS - 1 - i])
        part = (wanted - float(above[i]) + inside) / inside if inside else 1.0
        return float(2.0 ** (self.OCTAVES - (i + part) * 2 * self.OCTAVES / self.BINS))
