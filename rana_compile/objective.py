"""The loss whose increase prices an error, from whatever the model returns.

With logits: self-distillation, the negative log-likelihood of a label sampled from the model's own output
distribution at every position, whose squared gradient is the Fisher information, that is the curvature of the
divergence between adapted and dense outputs. Labels in the data play no part. Without logits: the output along a
random direction, in units of its size, which makes the price a scaled squared error.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.types import ConfigError, RanaError


def summed_loss(output: Any, generator: torch.Generator) -> Tensor:
    """A scalar, summed over tokens, whose gradient is recorded. Raises RanaError where the output is not finite."""
    logits = getattr(output, "logits", None)
    value = main_output(output)
    if (value < math.inf).all():  # logits of minus infinity rule a token out
        loss = _of_logits(logits, generator) if isinstance(logits, Tensor) else _along_a_direction(value, generator)
        if torch.isfinite(loss):
            return loss
    raise RanaError(
        "the model's output holds NaN or infinity on calibration data; check the model and the data, or use a wider "
        "dtype"
    )


def _of_logits(logits: Tensor, generator: torch.Generator) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1]).float()
    with torch.no_grad():
        probabilities = flat.softmax(-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(flat.device)
    return F.cross_entropy(flat, labels, reduction="sum")


def _along_a_direction(value: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
    return (value * direction).sum() / value.detach().square().mean().sqrt().clamp_min(1e-12)


def main_output(output: Any) -> Tensor:
    """The tensor that stands for the model's result. Raises ConfigError if there is none."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, name, None), Tensor):
            return getattr(output, name)
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ConfigError(f"the model returned a {type(output).__name__}; expected logits, a hidden state or a tensor")
    return first


def divergence(dense: Tensor, adapted: Tensor) -> float:
    """Mean KL(dense ‖ adapted) in nats per row over the last dimension's distributions."""
    p, q = dense.float().log_softmax(-1), adapted.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
