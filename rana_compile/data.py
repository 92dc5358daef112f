"""Calibration data as users have it → a list of batches of keyword arguments for the model."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rana_compile.types import ConfigError

Batch = dict[str, Any]
LEAST_ROWS = 32  # thresholds are chosen among 40 quantiles


def as_batches(batches: Iterable[Any], device: torch.device) -> list[Batch]:
    """Token tensors [batch, length], dicts of tensors, or a ``datasets.Dataset`` with ``input_ids``, one list.

    Raises ConfigError naming what is wrong with the first unusable batch.
    """
    iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, Tensor | Mapping | str) or not iterable:
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


def check_enough(rows: int) -> None:
    """Raises ConfigError for fewer tokens than thresholds can be fitted on."""
    if rows < LEAST_ROWS:
        raise ConfigError(
            f"the calibration data holds {rows} tokens; thresholds need at least {LEAST_ROWS}, and a good plan a few "
            "thousand: give more text"
        )


def rows_of(batch: Batch) -> int:
    """Tokens in a batch (elements of its first tensor's first two dimensions)."""
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    return int(torch.tensor(first.shape[:2]).prod())


def _as_batch(batch: Any, index: int, device: torch.device) -> Batch:
    if isinstance(batch, Mapping):
        values = {k: _tensor(v, index, k) for k, v in batch.items() if _is_numeric(v)}
        if "input_ids" in values and values["input_ids"].dim() == 1:  # a row of a datasets.Dataset
            values = {k: v.unsqueeze(0) for k, v in values.items()}
    else:
        values = {"input_ids": _tensor(batch, index, "input_ids")}
    empty = isinstance(batch, Mapping) and len(batch.get("input_ids", (0,))) == 0
    if empty or not values or any(v.numel() == 0 for v in values.values()):
        raise ConfigError(f"batch {index} is empty; expected tensors with at least one token")
    if "input_ids" in values:
        values["input_ids"] = _token_ids(values, index)
    for name, value in values.items():
        if value.is_floating_point() and value.isnan().any():
            raise ConfigError(f"batch {index} holds NaN in {name!r}; leave it out, or look at what made it")
    return {k: v.to(device) for k, v in values.items()}


def _tensor(value: Any, index: int, name: str) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"batch {index} holds no tensor in {name!r} ({error}); expected numbers in rows of one length: pad them, "
            "or give rows of other lengths in batches of their own"
        ) from error


def _token_ids(values: Batch, index: int) -> Tensor:
    """The batch's ids as embeddings take them. Raises ConfigError where they are none, or their mask is another's."""
    ids: Tensor = values["input_ids"]
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(
            f"batch {index} is a {ids.dtype} tensor of shape {tuple(ids.shape)}; "
            "expected integer token ids [batch, length]"
        )
    for name in ("attention_mask", "token_type_ids"):
        other = values.get(name, ids)
        if other.dim() == 2 and other.shape != ids.shape:
            raise ConfigError(
                f"batch {index} has input_ids of shape {tuple(ids.shape)} and {name} of shape {tuple(other.shape)}; "
                "expected the same"
            )
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.long()


def _is_numeric(value: Any) -> bool:
    """Whether the model gets it: tensors, arrays and lists, but no texts, which a dataset's rows may hold too."""
    if isinstance(value, list):
        return len(value) > 0 and not isinstance(value[0], str | Mapping | None)
    kind = getattr(getattr(value, "dtype", None), "kind", "")  # of an array: U and S are texts, O anything
    return hasattr(value, "__array__") and kind not in ("U", "S", "O")  # as tensors have


def _split_rows(batch: Batch) -> list[Batch]:
    counts = {k: v.shape[0] for k, v in batch.items() if v.dim()}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"the only batch holds tensors of {counts} rows, which cannot be split; give several batches")
    count = next(iter(counts.values()), 0)
    return [{k: v[i : i + 1] if v.dim() else v for k, v in batch.items()} for i in range(count)]
