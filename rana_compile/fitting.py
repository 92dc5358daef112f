"""Candidates of a site: adapters of every family at many operating points, each with its cost and its price.

The price of dropping coordinates D is the loss increase it predicts, token by token (METHOD.md):

    ½·E[(g·δ)²] = ½·E[(Σ_{j∈D} v_j)²],   v_j = u_j x_j  (u = Wᵀg, so no output is ever formed)

``Σ v_j²`` over D is the same without the cross terms of one token's gradient, which a few thousand tokens
estimate badly; the two are averaged. Bases are fitted on other tokens than those that price them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.allocation import Option
from rana_compile.flops import dense_flops
from rana_compile.types import Site

DENSITIES = tuple(k / 40 for k in range(4, 40))
RANKS = tuple(k / 8 for k in range(2, 8))
TALL = 2  # outputs per input from which B, read whole for every token, can pay
QUANTILE_SAMPLE = 200_000
RANK_ROWS = 2048  # tokens that price rank adapters
CROSS_TERMS = 0.5
ISOTROPIC = 0.1
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Candidate:
    """One adapter at one operating point. ``live``: mean coordinates kept per token on the pricing rows."""

    family: str  # "dense" or a name in FAMILIES
    tensors: Tensors
    live: float
    option: Option


@dataclass(frozen=True)
class Evidence:
    """What fitting sees of a site, in float32.

    Attributes:
        weight: stacked weight [d_out, d_in].
        x, u: paired inputs and input gradients [rows, d_in]; u is None without gradients.
        moment: E[x xᵀ] [d_in, d_in] over tokens to fit bases on, or None.
        fresh: which rows [rows] are not among those tokens; None: all.
    """

    site: Site
    weight: Tensor
    x: Tensor
    u: Tensor | None
    moment: Tensor | None = None
    fresh: Tensor | None = None

    def sensitivity(self) -> Tensor:
        """Loss-aware importance per input, c_j = sqrt(E[u_j²]), steadied by the column norms [d_in]."""
        norms = self.weight.square().sum(0)
        if self.u is None:
            return norms.sqrt()
        power = self.u.square().mean(0)
        return ((1 - ISOTROPIC) * power + ISOTROPIC * norms * (power.sum() / norms.sum())).sqrt()


def dense_candidate(evidence: Evidence) -> Candidate:
    site = evidence.site
    return Candidate("dense", {}, site.d_in, Option(dense_flops(site), 0.0))


def neuron_candidates(
    evidence: Evidence, importance: str = "loss", densities: tuple[float, ...] = DENSITIES
) -> Iterator[Candidate]:
    """Neuron adapters over densities. ``importance``: ``magnitude`` |x|, ``column`` |x|·‖W col‖, or ``loss``."""
    scale = importance_scale(evidence, importance)
    scores = evidence.x.abs() * scale  # [rows, d_in]
    family = FAMILIES["neuron"]
    levels = quantiles(scores, densities)
    effect = _effect(evidence.x, evidence.u, evidence.weight.square().sum(0))
    for level, (live, price) in zip(levels, _price_levels(effect, scores, levels), strict=True):
        tensors = {"threshold": level / scale.clamp_min(_TINY)}
        yield Candidate("neuron", tensors, live, Option(family.flops(evidence.site, live, tensors), price))


def importance_scale(evidence: Evidence, importance: str) -> Tensor:
    """The factor c_j of the score ``abs(x_j)·c_j`` [d_in]."""
    if importance == "magnitude":
        return torch.ones(evidence.site.d_in)
    if importance == "column":
        return evidence.weight.norm(dim=0)
    return evidence.sensitivity()


def rank_candidates(evidence: Evidence) -> Iterator[Candidate]:
    """Rank adapters (and static low rank, their densest point) over ``RANKS`` × ``DENSITIES``."""
    site = evidence.site
    if site.d_out < TALL * site.d_in:
        return
    output_basis, pull = output_basis_of(evidence)
    rows = slice(None) if evidence.fresh is None else evidence.fresh
    z = evidence.x[rows][:RANK_ROWS] @ (evidence.weight.t() @ output_basis)  # [rows, r_max]
    slope = None if evidence.u is None else evidence.u[rows][:RANK_ROWS] @ pull  # Uᵀg
    effect = _effect(z, slope, torch.ones(z.shape[1]))
    scale = torch.ones(z.shape[1]) if slope is None else slope.square().mean(0).sqrt()
    scores = z.abs() * scale
    for share in RANKS:
        r = max(1, round(share * z.shape[1]))
        kept = {"output_basis": output_basis[:, :r]}
        never = scores.index_fill(1, torch.arange(r, z.shape[1]), -1.0)  # beyond the rank: below every threshold
        levels = quantiles(scores[:, :r], DENSITIES[:-1:3]).flip(0)
        priced = _price_levels(effect, never, torch.cat([torch.zeros(1), levels]))
        for level, (live, price) in zip([None, *levels], priced, strict=True):
            name, tensors = "low_rank", kept
            if level is not None:
                name, tensors = "rank", kept | {"threshold": level / scale[:r].clamp_min(_TINY)}
            flops = FAMILIES[name].flops(site, live, tensors)
            if flops < dense_flops(site):
                yield Candidate(name, tensors, live, Option(flops, price))


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


def _effect(z: Tensor, slope: Tensor | None, energy: Tensor) -> tuple[Tensor, bool]:
    """What dropping each coordinate adds: (v [rows, d], True), or without gradients (squared error, False)."""
    if slope is None:
        return z.square() * energy, False
    return z * slope, True


def _price_levels(effect: tuple[Tensor, bool], scores: Tensor, levels: Tensor) -> list[tuple[float, float]]:
    """(mean coordinates kept per row, price) at each level, where scores [rows, d] below the level are dropped.

    One pass for all levels: every coordinate falls in the bucket between two levels, and what a level drops is
    the sum of the buckets below it.
    """
    values, has_gradient = effect
    ordered, order = levels.sort()
    bucket = torch.bucketize(scores, ordered, right=True)  # dropped at level k where bucket ≤ k

    def dropped(what: Tensor) -> Tensor:  # [rows, d] -> [rows, levels]
        sums = what.new_zeros(len(what), len(ordered) + 1).scatter_add_(1, bucket, what)
        return sums.cumsum(1)[:, :-1]

    count = torch.bincount(bucket.flatten(), minlength=len(ordered) + 1).cumsum(0)[:-1].double() / len(scores)
    if has_gradient:
        joint, apart = dropped(values).square().mean(0), dropped(values.square()).mean(0)
        prices = 0.5 * (CROSS_TERMS * joint + (1 - CROSS_TERMS) * apart)
    else:
        prices = dropped(values).mean(0) / values.sum(1).mean().clamp_min(1e-30)  # relative squared error
    result = [(scores.shape[1] - float(n), float(p)) for n, p in zip(count, prices, strict=True)]
    return [result[i] for i in order.argsort()]
