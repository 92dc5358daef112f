"""Calibration text from the model itself, where there is no other or too little of it.

A language model's samples cover what it was trained on, where a user's few thousand tokens cover one subject. Fitted on
both, a plan holds up better on subjects it was not shown (Williams et al. 2024, "Self-calibration for language model
quantization and pruning", arXiv 2410.17170; LLM-QAT, arXiv 2305.17888).
"""

from typing import Any

import torch
from torch import Tensor

from rana_compile.types import ConfigError

ROWS = 16  # sequences that are generated at once


def own_text(
    model: Any, tokens: int = 8192, length: int = 512, seed: int = 0, start: int | None = None
) -> list[Tensor]:
    """Text that the model writes, as batches for ``calibrate``: sampled at temperature 1 from all of its vocabulary.

    Args:
        model: a Hugging Face causal language model.
        tokens: how many; rounded up to whole batches.
        length: tokens of a batch.
        seed: makes the text reproducible on one device. PyTorch's own random state is left as it was.
        start: token id that every text begins with; by default the model's ``bos_token_id``.

    Returns:
        Token ids, each [1, length].

    Raises:
        ConfigError: bad numbers, a model that cannot generate, or no token to begin with.
    """
    for name, value in {"tokens": tokens, "length": length - 1}.items():
        if value < 1:
            raise ConfigError(f"{name} is {value + (name == 'length')}; expected at least {1 + (name == 'length')}")
    settings = getattr(model, "generation_config", None)
    if settings is None or not getattr(model, "can_generate", lambda: False)():
        raise ConfigError(f"{type(model).__name__} cannot generate text; give calibrate text of its kind instead")
    start = settings.bos_token_id if start is None else start
    if not isinstance(start, int):
        raise ConfigError(f"the model's bos_token_id is {start!r}; pass start=, the token id that texts begin with")
    count = -(-tokens // length)
    device = next(model.parameters()).device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type), torch.no_grad():
        torch.manual_seed(seed)
        parts = [_sampled(model, min(ROWS, count - i), length, start, device) for i in range(0, count, ROWS)]
    return list(torch.cat(parts).split(1))


def _sampled(model: Any, rows: int, length: int, start: int, device: torch.device) -> Tensor:
    """[rows, length]. No text ends early: what would follow the end is another text."""
    first = torch.full((rows, 1), start, device=device)
    return model.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=length - 1, min_new_tokens=length - 1, pad_token_id=start,
    )  # fmt: skip
