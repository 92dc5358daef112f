"""The loss whose increase prices an error, from whatever the model returns.

With logits: self-distillation, the negative log-likelihood of a label sampled from the model's own output
distribution at every position, whose squared gradient is the Fisher information, that is the curvature of the
divergence between adapted and dense outputs. Labels in the data play no part. Without logits: the output along a
random direction, in units of its size, which makes the price a scaled squared error.
"""

import math
from typing import Any

import torch
from torch import Tensor

from rana_compile.types import ConfigError, RanaError

AT_ONCE = 1 << 22  # logits of which copies are made


def differentiate(output: Any, generator: torch.Generator) -> None:
    """The backward pass of the loss, summed over tokens.

    Raises RanaError where the output is not finite, or has no gradients.
    """
    value, logits = main_output(output), getattr(output, "logits", None)
    if not value.requires_grad:
        raise RanaError(
            "no gradient leads from the model's output to its layers, by which adapters are fitted; remove what cuts "
            "it off inside of the model (no_grad, inference_mode, detach)"
        )
    if (value < math.inf).all():  # logits of minus infinity rule a token out
        if isinstance(logits, Tensor):
            logits.backward(_slope(logits.detach(), generator))
            return
        loss = _along_a_direction(value, generator)
        if torch.isfinite(loss):
            loss.backward()
            return
    raise RanaError(
        "the model's output holds NaN or infinity on calibration data; check the model and the data, or use a wider "
        "dtype"
    )


def _slope(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of the negative log-likelihood of labels drawn from these logits [..., vocabulary], with respect to them."""
    slope = logits.reshape(-1, logits.shape[-1]).float().softmax(-1)
    labels = torch.multinomial(slope.cpu(), 1, generator=generator).to(slope.device)
    return slope.scatter_add_(1, labels, slope.new_full(labels.shape, -1.0)).view_as(logits).to(logits.dtype)


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
    width = dense.shape[-1]
    rows, at_once = dense.numel() // width, max(1, AT_ONCE // width)
    sums = []
    for p, q in zip(*(t.reshape(rows, width).split(at_once) for t in (dense, adapted)), strict=True):
        p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        sums.append((p.exp() * (p - q)).sum())
    return float(torch.stack(sums).cpu().double().sum() / rows)
