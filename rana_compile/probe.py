"""How much the loss cares about a token, predicted from the token itself.

Tokens differ in their gradients far more than in their inputs: half of all tokens hardly matter. The size of a
token's gradient is not known when it is computed, but a good part of it can be read off the site's input:

    log s(x) = a · x + b,   s² ≈ Σ_j (u_j / c_j)² / d,   u the input gradient, c_j the usual size of u_j

a gamma regression with a log link (McCullagh & Nelder 1989, chapter 8), whose Fisher information does not depend on
the fit: one Cholesky factor serves all iterations. It costs d_in multiply-adds per token, a dense product's
d_out-th part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rana_compile.adapters.base import sensitivity

RIDGE = 24.0  # times d / rows, in units of the features' variance: chosen on text of another domain
ITERATIONS, STEP = 10, 0.7
LEAST_ROWS = 16  # below that there is nothing to learn
EXTREME = 20.0  # a row counts at most as this many times what is predicted for it


def power_of(u: Tensor, usual: Tensor) -> Tensor:
    """s² as observed [rows]: mean square of u [rows, d] over ``usual`` [d]."""
    return (u / usual.clamp_min(torch.finfo(torch.float32).tiny)).square().mean(1)


def fit_probe(x: Tensor, power: Tensor) -> Tensor:
    """(a, b) [d + 1], so that ``sensitivity(x, probe)`` predicts sqrt(power) up to a common factor.

    Args:
        x: inputs [rows, d], float32.
        power: observed s² [rows].
    """
    rows, d = x.shape
    centre, spread = x.mean(0), x.std(0)
    spread = spread.clamp_min(float(spread.mean()) * 1e-3 + 1e-20)
    features = (x - centre) / spread
    ridge = RIDGE * d / rows
    information = features.t() @ features / rows
    information.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(information)
    slope, offset = x.new_zeros(d), power.mean().clamp_min(1e-30).log()
    for _ in range(ITERATIONS):
        excess = (power / (features @ slope + offset).exp()).clamp_max(EXTREME) - 1
        gradient = features.t() @ excess / rows - ridge * slope
        slope += STEP * torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        offset += STEP * excess.mean()
    slope = slope / spread / 2  # of log s, not of log s²
    return torch.cat([slope, -(slope @ centre)[None]])


def held_out_sensitivity(x: Tensor, power: Tensor) -> Tensor:
    """s [rows] as predicted by probes that were fitted on the other half of the rows, to price honestly."""
    half = len(x) // 2
    parts = ((x[:half], fit_probe(x[half:], power[half:])), (x[half:], fit_probe(x[:half], power[:half])))
    return torch.cat([sensitivity(rows, probe[None])[:, 0] for rows, probe in parts])


@dataclass(frozen=True)
class Tokens:
    """A probe [d + 1] and the sensitivities [rows] that its like, fitted without them, predict for the rows."""

    probe: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, x: Tensor, u: Tensor | None) -> "Tokens | None":
        """From a site's inputs x [rows, d] and gradients u [rows, n], at its input or further on; None without u."""
        if u is None or len(x) < LEAST_ROWS:
            return None
        power = power_of(u, u.square().mean(0).sqrt())
        return cls(fit_probe(x, power), held_out_sensitivity(x, power))
