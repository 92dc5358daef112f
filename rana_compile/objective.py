"""The loss whose increase prices an error, from whatever the model returns.

With logits: self-distillation, the negative log-likelihood of a label sampled from the model's own output
distribution at every position, whose squared gradient is the Fisher information, that is the curvature of the
divergence between adapted and dense outputs. Labels in the data play no part. Without logits: the output along a
random direction, in units of its size, which makes the price a scaled squared error.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rana_compile.types import ConfigError, RanaError

AT_ONCE = 1 << 22  # logits of which copies are made
NO_LABEL = -100
NOT_FINITE = (
    "the model's output holds NaN or infinity on calibration data; check the model and the data, or use a wider dtype"
)
TEXT = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "cache_position", "labels", "use_cache"}


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
    raise RanaError(NOT_FINITE)


def _slope(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Of the negative log-likelihood of labels drawn from these logits [..., vocabulary], with respect to them."""
    slope = logits.reshape(-1, logits.shape[-1]).float().softmax(-1)
    if not slope.sum(-1).isfinite().all():  # nothing is left to a row
        raise RanaError(NOT_FINITE)
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
    return distances(dense, adapted)[0]


def distances(dense: Tensor, adapted: Tensor, labels: Tensor | None = None) -> tuple[float, float, float]:
    """How far outputs are from the dense ones, in nats.

    Args:
        dense, adapted: logits [..., vocabulary].
        labels: [...]; rows without one have ``NO_LABEL``. By default none has.

    Returns:
        KL(dense ‖ adapted), mean over all rows; the same summed over rows with a label; and the increase of the labels'
        negative log-likelihood, summed.
    """
    if labels is None:
        labels = torch.full(dense.shape[:-1], NO_LABEL, device=dense.device)
    sums = []
    for (p, q), label in zip(_in_parts(dense, adapted), labels.flatten().split(_rows_at_once(dense)), strict=True):
        known, ratio = label != NO_LABEL, p - q
        apart = (p.exp() * ratio).sum(-1)
        increase = ratio.gather(-1, label.clamp_min(0)[:, None])[:, 0]
        sums.append(torch.stack([apart.sum(), apart[known].sum(), increase[known].sum()]))
    total, on_labels, increases = torch.stack(sums).cpu().double().sum(0).tolist()
    return total / (dense.numel() // dense.shape[-1]), on_labels, increases


def next_tokens(batch: Mapping[str, Any], logits: Tensor) -> Tensor | None:
    """The text's own tokens that a causal language model's logits [batch, length, vocabulary] are of: [batch, length].

    ``NO_LABEL`` after the last token, where ``attention_mask`` says padding, and for tokens that have no logit. None
    where the batch is not of text alone, or its logits are not one for each of its tokens.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.shape != logits.shape[:-1] or not TEXT.issuperset(batch):
        return None
    labels = ids.roll(-1, -1).to(logits.device, torch.long)
    labels[..., -1] = NO_LABEL
    if isinstance(mask, Tensor):
        if mask.shape != ids.shape:
            return None
        labels[((mask == 0) | (mask.roll(-1, -1) == 0)).to(labels.device)] = NO_LABEL
    labels[(labels < 0) | (labels >= logits.shape[-1])] = NO_LABEL
    return labels


def writes_text(model: Any) -> bool:
    """Whether transformers would have it generate text from its inputs alone; not yet that it is causal."""
    generates = getattr(model, "can_generate", lambda: False)()
    return bool(generates) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _rows_at_once(logits: Tensor) -> int:
    return max(1, AT_ONCE // logits.shape[-1])


def _in_parts(dense: Tensor, adapted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The log-probabilities of both, float32 [rows, vocabulary], some rows at once."""
    parts = (t.reshape(-1, t.shape[-1]).split(_rows_at_once(t)) for t in (dense, adapted))
    for p, q in zip(*parts, strict=True):
        yield p.float().log_softmax(-1), q.float().log_softmax(-1)
