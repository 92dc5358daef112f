"""MODEL as users name it, a directory, a hub name or a GGUF file, → a causal language model and its tokenizer."""

from pathlib import Path
from typing import Any

import torch

from rana_compile.types import ConfigError, RanaError

DTYPES = ("float32", "bfloat16", "float16")


def load_causal(
    name: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", text: bool = True
) -> tuple[Any, Any]:
    """(model, tokenizer), ready for inference: evaluation mode, parameters without gradients.

    Args:
        name: a directory as ``save_pretrained`` writes it, or with one GGUF file; a GGUF file, beside which a
            ``tokenizer.json`` is preferred to what the file holds; else a name on the hub.
        dtype: of the weights; those of a GGUF file are decoded to it.
        text: False: no tokenizer is needed, and None comes in its place.

    Raises:
        ConfigError: there is no such model, or a directory holds none or several.
        RanaError: a package that reading it needs is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, extra = _place(name)
    own = "gguf_file" in extra and (Path(place) / "tokenizer.json").exists()
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **extra)
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **({} if own else extra)) if text else None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{str(name)!r} holds a model, but no tokenizer that can be read; put one beside it with "
                f"tokenizer.save_pretrained ({' '.join(str(error).split())})"
            ) from error
    except RanaError:
        raise
    except ImportError as error:
        raise RanaError(f"{name}: {error}; for GGUF files: pip install 'rana-compile[gguf]'") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{str(name)!r} is not a directory, hub name or GGUF file of a causal language model: {_first_line(error)}"
        ) from error
    if hasattr(model.config, "quantization_config") and "gguf_file" in extra:
        del model.config.quantization_config  # the weights are decoded now, and save_pretrained refuses with these
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)
    return model.eval().requires_grad_(False).to(device), tokenizer


def _place(name: str | Path) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes: a directory or hub name, and the GGUF file in it."""
    path = Path(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{str(name)!r} is a file, but no GGUF file; give the model's directory")
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir() or (path / "config.json").exists():
        return str(name), {}
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"{str(name)!r} holds no config.json and {len(files)} GGUF files; expected one of them")
    return str(path), {"gguf_file": files[0].name}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
