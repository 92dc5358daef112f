"""Calibration data as users have it → a list of batches of keyword arguments for the model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rana_compile.types import ConfigError

Batch = dict[str, Any]


def as_batches(batches: Iterable[Any], device: torch.device) -> list[Batch]:
    """Token tensors [batch, length], dicts of tensors, or a ``datasets.Dataset`` with ``input_ids``, one list.

    Raises ConfigError naming what is wrong with the first unusable batch.
    """
    if isinstance(batches, Tensor | Mapping | str):
        raise ConfigError(
            f"batches is a {type(batches).__name__}; expected an iterable of token tensors [batch, length] or dicts"
        )
    result = [_as_batch(batch, i, device) for i, batch in enumerate(batches)]
    if len(result) == 1:
        result = _split_rows(result[0])
    if len(result) < 2:
        raise ConfigError(
            f"calibration needs at least 2 batches (one is held back to check the fit), got {len(result)} "
            "of one row; give more text"
        )
    return result


def rows_of(batch: Batch) -> int:
    """Tokens in a batch (elements of its first tensor's first two dimensions)."""
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    return int(torch.tensor(first.shape[:2]).prod())


def _as_batch(batch: Any, index: int, device: torch.device) -> Batch:
    if isinstance(batch, Mapping):
        values = {k: v if isinstance(v, Tensor) else torch.as_tensor(v) for k, v in batch.items() if _is_numeric(v)}
        if "input_ids" in values and values["input_ids"].dim() == 1:  # a row of a datasets.Dataset
            values = {k: v.unsqueeze(0) for k, v in values.items()}
    else:
        values = {"input_ids": batch if isinstance(batch, Tensor) else torch.as_tensor(batch)}
        ids = values["input_ids"]
        if ids.dim() != 2 or ids.is_floating_point():
            raise ConfigError(
                f"batch {index} is a {ids.dtype} tensor of shape {tuple(ids.shape)}; "
                "expected integer token ids [batch, length]"
            )
    if not values or any(v.numel() == 0 for v in values.values()):
        raise ConfigError(f"batch {index} is empty; expected tensors with at least one token")
    return {k: v.to(device) for k, v in values.items()}


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and not isinstance(value[0] if value else "", str))


def _split_rows(batch: Batch) -> list[Batch]:
    count = min(v.shape[0] for v in batch.values())
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(count)]
