"""Text → windows of tokens, drawn from all over it, and the loss of a model on them."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.types import ConfigError


def read_texts(files: Iterable[str | Path]) -> list[str]:
    """The files' contents (UTF-8). Raises ConfigError for one that cannot be read."""
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise ConfigError(f"cannot read the text {str(file)!r}: {error.strerror or error}") from error
    return texts


def windows_of(tokenizer: Any, texts: Sequence[str], length: int, tokens: int, seed: int = 0) -> Tensor:
    """Windows [n, length] that hold about ``tokens`` tokens together, or as many as the texts have.

    Each begins with the first token that the tokenizer puts of its own accord, if it does.
    Raises ConfigError if there is not even one window.
    """
    available = len(token_ids(tokenizer, texts)) // length
    if not available:
        raise ConfigError(
            f"the text has fewer than {length} tokens, not one window; give more text or a smaller length"
        )
    return with_bos(tokenizer, sample_windows(tokenizer, texts, length, min(available, -(-tokens // length)), seed))


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Tensor:
    """The texts' token ids, one after the other, without special tokens: [tokens]."""
    ids = [tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    return torch.tensor([i for part in ids for i in part])


def sample_windows(tokenizer: Any, texts: Iterable[str], length: int, count: int, seed: int = 0) -> Tensor:
    """``count`` windows [count, length] that do not overlap, drawn from all over the texts.

    All over, since a first chapter is not like the rest and thresholds fitted on it drift.
    Raises ConfigError if the texts are too short.
    """
    tokens = token_ids(tokenizer, texts)
    available = len(tokens) // length
    if available < count:
        raise ConfigError(f"the text has {available} windows of {length} tokens; {count} were asked for")
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return tokens[: available * length].view(available, length)[chosen]


def with_bos(tokenizer: Any, windows: Tensor) -> Tensor:
    """Windows [n, length] with a first token, where the tokenizer puts one of its own accord."""
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token_id is None or ids[0] != tokenizer.bos_token_id:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], ids[0]), windows[:, :-1]], 1)


def mean_nll(model: Callable[..., Any], windows: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """Mean negative log-likelihood, in nats, over every next-token prediction of the windows.

    Each window is one forward pass without a cache, so an adapted model has its masks on for every scored token.

    Args:
        model: called with ``input_ids=[1, length]`` and ``use_cache=False``, returns ``.logits``.
        windows: token ids [windows, length].
        progress: called after each window.
    """
    total = 0.0
    for window in windows:
        total += F.cross_entropy(logits_of(model, window)[:-1], window[1:], reduction="sum").item()
        progress()
    return total / (len(windows) * (windows.shape[1] - 1))


def logits_of(model: Callable[..., Any], window: Tensor) -> Tensor:
    """[length, vocabulary], float32: one forward pass over a window [length], without a cache."""
    with torch.no_grad():
        return model(input_ids=window[None], use_cache=False).logits[0].float()


def perplexity(model: Callable[..., Any], windows: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """``exp`` of ``mean_nll``."""
    return math.exp(mean_nll(model, windows, progress))
