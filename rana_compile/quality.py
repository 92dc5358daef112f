"""An adapted model against the dense one on text: loss, divergence, agreement, and what it computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rana_compile.evaluation import adapted
from rana_compile.objective import divergence
from rana_compile.plan import Plan
from rana_compile.text import logits_of


@dataclass(frozen=True)
class Quality:
    """Measured on the same tokens, masks on for every one of them.

    Attributes:
        kept: realised FLOPs, as a share of the dense FLOPs of the plan's sites.
        loss, dense_loss: mean negative log-likelihood of the next token, nats.
        divergence: mean KL(dense ‖ adapted), nats per token.
        agreement: share of tokens for which both find the same next token likeliest.
        tokens: scored.
    """

    kept: float
    loss: float
    dense_loss: float
    divergence: float
    agreement: float
    tokens: int

    @property
    def increase(self) -> float:
        """Of the loss, nats per token."""
        return self.loss - self.dense_loss

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def dense_perplexity(self) -> float:
        return math.exp(self.dense_loss)


def measure_quality(
    model: Callable[..., Any], plan: Plan, windows: Sequence[Tensor], progress: Callable[[], None] = lambda: None
) -> Quality:
    """Both models on windows of token ids [length], one forward pass each, without a cache.

    Args:
        model: a causal language model as transformers has them.
        progress: called after each window.

    Raises PlanError if the plan belongs to other weights.
    """
    loss = dense_loss = apart = same = 0.0
    with adapted(model, plan) as run:  # type: ignore[arg-type]
        for window in windows:
            p, q = logits_of(model, window)[:-1], logits_of(run, window)[:-1]
            dense_loss += float(F.cross_entropy(p, window[1:], reduction="sum"))
            loss += float(F.cross_entropy(q, window[1:], reduction="sum"))
            apart += divergence(p, q) * len(p)
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
            progress()
        kept = run.flops_kept
    tokens = sum(len(window) - 1 for window in windows)
    return Quality(kept, loss / tokens, dense_loss / tokens, apart / tokens, same / tokens, tokens)
