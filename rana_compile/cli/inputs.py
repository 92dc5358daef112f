"""The inputs that commands share: a model with its tokenizer, windows of text."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rana_compile.cli.screen import Screen
from rana_compile.loading import load_causal
from rana_compile.text import read_texts, windows_of
from rana_compile.types import ConfigError


def load(settings: argparse.Namespace, screen: Screen, text: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) as the command line names them; None for the tokenizer of a command that reads no ``text``."""
    from transformers.utils import logging

    for files in ("text", "test_text"):
        read_texts(getattr(settings, files, None) or ())  # before minutes of loading
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {settings.device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    with screen.stage(f"loading {settings.model}"):
        return load_causal(settings.model, getattr(torch, settings.dtype), device, text)


def windows(settings: argparse.Namespace, tokenizer: Any, screen: Screen, files: Sequence[Path], tokens: int) -> Tensor:
    """Windows [n, length] of the files, on the device; says so if they hold less than was asked for."""
    found = windows_of(tokenizer, read_texts(files), settings.length, tokens, settings.seed)
    if found.numel() < tokens:
        screen.say(f"the text has only {found.numel():,} of {tokens:,} tokens, in windows of {settings.length}")
    return found.to(settings.device)
