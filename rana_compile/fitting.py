"""Candidates of a site: adapters of every family at many operating points, each with its cost and its price.

The price of dropping coordinates D is the loss increase it predicts, token by token (METHOD.md):

    ½·E[(g·δ)²] = ½·E[(Σ_{j∈D} v_j)²],   v_j = u_j x_j  (u = Wᵀg, so no output is ever formed)

``Σ v_j²`` over D is the same without the cross terms of one token's gradient, which a few thousand tokens
estimate badly; the two are averaged. Bases are fitted on other tokens than those that price them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors, adapter_flops
from rana_compile.allocation import Option, combined
from rana_compile.flops import dense_flops
from rana_compile.kernels.reference import ACTIVATIONS
from rana_compile.offload import SiteWeights
from rana_compile.probe import Tokens
from rana_compile.statistics import Sample
from rana_compile.types import ConfigError, Site

DENSITIES = tuple(k / 40 for k in range(4, 40))
RANKS = tuple(k / 8 for k in range(2, 9))
TALL = 2  # outputs per input from which B, read whole for every token, can pay
QUANTILE_SAMPLE = 100_000
RANK_ROWS = 2048  # tokens that price rank adapters
CROSS_TERMS = 0.2
ISOTROPIC = 0.3
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Candidate:
    """One adapter at one operating point. ``live``: mean coordinates kept per token by each mask, on pricing rows."""

    family: str  # "dense" or a name in FAMILIES
    tensors: Tensors
    live: tuple[float, ...]
    option: Option


@dataclass(frozen=True)
class Evidence:
    """What fitting sees of a site.

    Attributes:
        weights: of each linear [d_out_i, d_in].
        sample: paired inputs and input gradients of token rows.
        moment: E[x xᵀ] [d_in, d_in] over tokens to fit bases on, or None.
    """

    site: Site
    weights: Sequence[Tensor]
    sample: Sample
    moment: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.weights.device if isinstance(self.weights, SiteWeights) else self.weights[0].device

    @property
    def x(self) -> Tensor:
        """Inputs [rows, d_in], float32."""
        assert self.sample.x is not None
        return self.sample.x[: self.sample.rows].to(self.device).float()

    @property
    def u(self) -> Tensor | None:
        """Input gradients [rows, d_in], float32, or None without gradients."""
        u = self.sample.gradients(self.device)
        return None if u is None else u.sum(1)

    @property
    def weight(self) -> Tensor:
        """The stack [d_out, d_in], float32."""
        return torch.cat([w.detach().float() for w in self.weights])

    def part(self, index: int) -> "Part":
        """One linear of the stack."""
        u = self.sample.gradients(self.device)
        return Part(self.x, None if u is None else u[:, index], self.weights[index].detach().float().square().sum(0))


@dataclass(frozen=True)
class Part:
    """One linear of a site, in float32: inputs x and input gradients u [rows, d_in], squared column norms [d_in]."""

    x: Tensor
    u: Tensor | None
    norms: Tensor

    def importance(self, tokens: Tensor | None = None) -> Tensor:
        """Loss-aware importance per input, c_j = sqrt(E[u_j²]), steadied by the column norms [d_in].

        ``tokens`` [rows]: sensitivities, to count a row's gradients relative to what is predicted for it.
        """
        if self.u is None:
            return self.norms.sqrt()
        power = (self.u if tokens is None else self.u / tokens[:, None]).square().mean(0)
        return ((1 - ISOTROPIC) * power + ISOTROPIC * self.norms * (power.sum() / self.norms.sum())).sqrt()

    def scale(self, importance: str) -> Tensor:
        """The factor c_j of the score ``abs(x_j)·c_j`` [d_in]; ``importance`` as in ``neuron_candidates``."""
        if importance == "magnitude":
            return torch.ones_like(self.norms)
        if importance == "column":
            return self.norms.sqrt()
        if importance in ("loss", "token"):
            return self.importance()
        raise ConfigError(f"unknown importance {importance!r}; known: magnitude, column, loss, token")


@dataclass(frozen=True)
class _Level:
    """One operating point of one mask: thresholds [n], mean live coordinates, cost and price; its probe, if any."""

    threshold: Tensor
    live: float
    option: Option
    probe: Tensor | None = None


def dense_candidate(evidence: Evidence) -> Candidate:
    return Candidate("dense", {}, (), Option(dense_flops(evidence.site), 0.0))


def neuron_candidates(
    evidence: Evidence, importance: str = "token", densities: tuple[float, ...] = DENSITIES
) -> Iterator[Candidate]:
    """Neuron adapters, each linear of a stack at its own density, the combinations that pay.

    ``importance``: ``magnitude`` |x|, ``column`` |x|·‖W col‖, ``loss`` |x|·sqrt(E[u²]), or ``token``: the same times
    the sensitivity predicted for the token.
    """
    levels = _input_levels(evidence, importance, densities)
    for option, chosen in combined([[level.option for level in part] for part in levels]):
        points = [part[k] for part, k in zip(levels, chosen, strict=True)]
        if any(p.live < evidence.site.d_in for p in points):
            yield _neuron(evidence.site, points, option.price)


def neuron_at(evidence: Evidence, ratio: float, importance: str = "column") -> Candidate:
    """The neuron adapter whose every linear keeps one share of its inputs."""
    if ratio >= 1:
        return dense_candidate(evidence)
    points = [part[-1] for part in _input_levels(evidence, importance, (ratio,))]
    return _neuron(evidence.site, points, sum(p.option.price for p in points))


def _neuron(site: Site, points: Sequence[_Level], price: float) -> Candidate:
    tensors = {"threshold": torch.stack([p.threshold for p in points]), "probe": _probes(points)}
    return _masked("neuron", site, tensors, points, price)


def _masked(family: str, site: Site, tensors: Tensors, points: Sequence[_Level], price: float) -> Candidate:
    live = tuple(p.live for p in points)
    return Candidate(family, tensors, live, Option(adapter_flops(FAMILIES[family], site, live, tensors), price))


def _probes(points: Sequence[_Level]) -> Tensor:
    """[masks, d_in + 1], zero (no effect) for a mask without one; [0, d_in + 1] if none has one."""
    none = points[0].threshold.new_zeros(len(points[0].threshold) + 1)
    if all(p.probe is None for p in points):
        return none.expand(0, -1)
    return torch.stack([none if p.probe is None else p.probe for p in points])


def _input_levels(evidence: Evidence, importance: str, densities: tuple[float, ...]) -> list[list[_Level]]:
    """For each linear of a site: all inputs, then a mask at each density."""
    site = evidence.site
    result = []
    for index, d_out in enumerate(site.d_outs):
        part = evidence.part(index)
        effect = _effect(part.x, part.u, part.norms)
        whole = _Level(torch.zeros_like(part.norms), site.d_in, Option(2.0 * site.d_in * d_out, 0.0))
        levels = list(_levels(effect, part.x, part.scale(importance), densities, 2.0 * d_out))
        # an MLP's last input is known too late for a fused kernel
        tokens = Tokens.of(part.x, part.u) if importance == "token" and site.kind != "down" else None
        if tokens is not None:
            scale = part.importance(tokens.predicted)
            levels = _better(levels, list(_levels(effect, part.x, scale, densities, 2.0 * d_out, tokens)))
        result.append([whole, *levels])
    return result


def _better(plain: list[_Level], probed: list[_Level]) -> list[_Level]:
    """The levels that promise less loss over all densities."""
    return min(plain, probed, key=lambda levels: sum(level.option.price for level in levels))


def _levels(
    effect: "_Effect",
    z: Tensor,
    scale: Tensor,
    densities: tuple[float, ...],
    flops: float,
    tokens: Tokens | None = None,
) -> Iterator[_Level]:
    """A mask of z [rows, n] at each density of the scores abs(z)·scale·sensitivity; ``flops`` per live coordinate."""
    scores = z.abs() * scale
    if tokens is not None:
        scores *= tokens.predicted[:, None]
    levels = quantiles(scores, densities)
    for level, (live, price) in zip(levels, _price_levels(effect, scores, levels), strict=True):
        threshold = level / scale.clamp_min(_TINY)
        yield _Level(threshold, live, Option(flops * live, price), None if tokens is None else tokens.probe)


def gated_candidates(
    evidence: Evidence, down: Evidence, down_choice: Candidate, importance: str = "token"
) -> Iterator[Candidate]:
    """Gated adapters of a ``gate_up`` site: the gate's inputs masked or not, up's rows by the activated gate.

    A row that is not computed is an input that ``down`` does not get; what ``down_choice`` drops anyway is not
    charged again. None unless the activation is known and both samples hold the same tokens.
    """
    if evidence.site.activation is None or not evidence.sample.same_rows(down.sample):
        return
    activated = _activated_gate(evidence)  # [rows, h]
    hidden = down.part(0)
    effect = _effect(hidden.x, hidden.u, hidden.norms)
    if "threshold" in down_choice.tensors:
        effect = effect.where(hidden.x.abs() >= down_choice.tensors["threshold"][0])
    densities, flops = DENSITIES[::2], 2.0 * evidence.site.d_in
    rows = list(_levels(effect, activated, _row_scale(activated, hidden), densities, flops))
    if importance == "token" and (tokens := Tokens.of(evidence.x, hidden.u)):
        scale = _row_scale(activated, hidden, tokens.predicted)
        rows = _better(rows, list(_levels(effect, activated, scale, densities, flops, tokens)))
    inputs = _input_levels(evidence, importance, DENSITIES)[0]
    for option, (i, j) in combined([[p.option for p in inputs], [p.option for p in rows]]):
        yield _gated(evidence.site, inputs[i], rows[j], option.price)


def gated_at(evidence: Evidence, down: Evidence, ratio: float) -> Candidate:
    """CATS: a dense gate, the rows of up kept where abs(act(gate)) is largest."""
    activated = _activated_gate(evidence)
    hidden = down.part(0)
    effect = _effect(hidden.x, hidden.u, hidden.norms)
    (rows,) = _levels(effect, activated, torch.ones_like(hidden.norms), (ratio,), 2.0 * evidence.site.d_in)
    d_in, h = evidence.site.d_in, evidence.site.d_outs[0]
    whole = _Level(activated.new_zeros(d_in), d_in, Option(2.0 * d_in * h, 0.0))
    return _gated(evidence.site, whole, rows, rows.option.price)


def _gated(site: Site, inputs: _Level, rows: _Level, price: float) -> Candidate:
    tensors = {"threshold": inputs.threshold[None], "gate_threshold": rows.threshold, "probe": _probes([inputs, rows])}
    return _masked("gated", site, tensors, [inputs, rows], price)


def _activated_gate(evidence: Evidence) -> Tensor:
    assert evidence.site.activation is not None
    gate = evidence.x @ evidence.weights[0].detach().float().t()
    return ACTIVATIONS[evidence.site.activation](gate)


def _row_scale(activated: Tensor, hidden: Part, tokens: Tensor | None = None) -> Tensor:
    """c_j of the score abs(a_j)·c_j: what the other factor of h_j = a_j·up_j usually is, in its effect on the loss."""
    up = hidden.x / activated.masked_fill(activated == 0, torch.inf)
    weight = hidden.norms
    if hidden.u is not None:
        weight = (hidden.u if tokens is None else hidden.u / tokens[:, None]).square()
    return (up.square() * weight).mean(0).sqrt()


def is_tall(site: Site) -> bool:
    """Whether rank adapters are offered for a site, and its second moment is needed."""
    return site.d_out >= TALL * site.d_in


def rank_candidates(evidence: Evidence) -> Iterator[Candidate]:
    """Rank adapters (and static low rank, their densest point) over ``RANKS`` × ``DENSITIES``.

    What lies outside of the basis, where few tokens made it, counts as one more coordinate that is always dropped.
    """
    site = evidence.site
    if not is_tall(site):
        return
    rows = evidence.sample.fresh[: evidence.sample.rows].to(evidence.device)
    if not rows.any():  # of one batch only: no tokens are left to price the basis on
        return
    output_basis, pull = output_basis_of(evidence)
    x, weight = evidence.x[rows][:RANK_ROWS], evidence.weight
    z = x @ (weight.t() @ output_basis)  # [rows, r_max]
    u = None if evidence.u is None else evidence.u[rows][:RANK_ROWS]
    slope = None if u is None else u @ pull  # Uᵀg
    whole = (x * (x @ (weight.t() @ weight) if u is None else u)).sum(1, keepdim=True)  # ‖Wx‖², or g·Wx
    within = _effect(z, slope, z.new_ones(z.shape[1]))
    effect = _Effect(torch.cat([within.values, whole - within.values.sum(1, keepdim=True)], 1), within.has_gradient)
    scale = z.new_ones(z.shape[1]) if slope is None else slope.square().mean(0).sqrt()
    scores = F.pad(z.abs() * scale, (0, 1))
    for share in RANKS:
        r = max(1, round(share * z.shape[1]))
        kept = {"output_basis": output_basis[:, :r]}
        beyond = torch.arange(r, scores.shape[1], device=z.device)
        never = scores.index_fill(1, beyond, -1.0)  # below every threshold
        levels = quantiles(scores[:, :r], DENSITIES[:-1:3]).flip(0)
        priced = _price_levels(effect, never, torch.cat([levels.new_zeros(1), levels]))
        for level, (live, price) in zip([None, *levels], priced, strict=True):
            name, tensors = "low_rank", kept
            counts: tuple[float, ...] = ()
            if level is not None:
                name, tensors = "rank", kept | {"threshold": level / scale[:r].clamp_min(_TINY)}
                counts = (live,)
            flops = adapter_flops(FAMILIES[name], site, counts, tensors)
            if flops < dense_flops(site):
                yield Candidate(name, tensors, counts, Option(flops, price))


def output_basis_of(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """U [d_out, r], the left singular vectors of W X, largest first, and M [d_in, r] with U = W M.

    From second moments alone: eigenvectors of W C Wᵀ, or of C^½ WᵀW C^½ where that is smaller.
    """
    weight = evidence.weight.double()
    assert evidence.moment is not None
    moment = evidence.moment.double()
    if weight.shape[0] <= weight.shape[1]:
        values, basis = torch.linalg.eigh(weight @ moment @ weight.t())
        basis = basis.flip(1)
        gram = weight @ weight.t()
        gram.diagonal().add_(gram.diagonal().mean() * 1e-9)  # a dead output must not make it singular
        return basis.float(), (weight.t() @ torch.linalg.solve(gram, basis)).float()
    root = _square_root(moment)
    values, vectors = torch.linalg.eigh(root @ (weight.t() @ weight) @ root)
    keep = values > values[-1] * 1e-10
    pull = root @ vectors[:, keep].flip(1) / values[keep].flip(0).sqrt()  # [d_in, r]
    return (weight @ pull).float(), pull.float()


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.t()


def quantiles(scores: Tensor, densities: tuple[float, ...]) -> Tensor:
    """Levels that leave each share of the scores [rows, d] at or above them, from at most QUANTILE_SAMPLE."""
    stride = max(1, scores.numel() // QUANTILE_SAMPLE)
    while math.gcd(stride, scores.shape[1]) > 1:  # every coordinate has its turn
        stride += 1
    ordered = scores.flatten()[::stride].sort().values
    index = [min(len(ordered) - 1, round((1 - density) * len(ordered))) for density in densities]
    return ordered[index]


@dataclass(frozen=True)
class _Effect:
    """What dropping each coordinate adds [rows, n]: v where there are gradients, else its squared error."""

    values: Tensor
    has_gradient: bool

    def where(self, kept: Tensor) -> "_Effect":
        return _Effect(self.values * kept, self.has_gradient)


def _effect(z: Tensor, slope: Tensor | None, energy: Tensor) -> _Effect:
    return _Effect(z.square() * energy, False) if slope is None else _Effect(z * slope, True)


def _price_levels(effect: _Effect, scores: Tensor, levels: Tensor) -> list[tuple[float, float]]:
    """(mean coordinates kept per row, price) at each level, where scores [rows, d] below the level are dropped.

    One pass for all levels: every coordinate falls in the bucket between two levels, and what a level drops is
    the sum of the buckets below it.
    """
    values = effect.values
    ordered, order = levels.sort()
    bucket = torch.bucketize(scores, ordered, right=True)  # dropped at level k where bucket ≤ k

    def dropped(what: Tensor) -> Tensor:  # [rows, d] -> [rows, levels]
        unit = 1.0
        if not what.is_cpu:  # where threads race for the same sum only integers add up the same every time
            unit = float(what.abs().max().clamp_min(1e-30)) / 2**40
            what = (what.double() / unit).long()
        sums = what.new_zeros(len(what), len(ordered) + 1).scatter_add_(1, bucket, what)
        return sums.cumsum(1)[:, :-1] * unit

    count = torch.bincount(bucket.flatten(), minlength=len(ordered) + 1).cumsum(0)[:-1].double() / len(scores)
    if effect.has_gradient:
        joint, apart = (sums.float().mean(0) for sums in (dropped(values).square(), dropped(values.square())))
        prices = 0.5 * (CROSS_TERMS * joint + (1 - CROSS_TERMS) * apart)
    else:
        prices = dropped(values).float().mean(0) / values.sum(1).mean().clamp_min(1e-30)  # relative squared error
    back = order.argsort()
    return list(zip((scores.shape[1] - count[back]).tolist(), prices[back].tolist(), strict=True))
