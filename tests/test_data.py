"""Calibration data as users have it, and what is said of data that is none."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rana_compile import ConfigError
from rana_compile.data import LEAST_ROWS, as_batches, check_enough, rows_of

CPU = torch.device("cpu")
IDS = torch.arange(8).view(1, 8)


@pytest.mark.parametrize(
    "batch",
    [
        IDS,
        IDS.int(),
        IDS.to(torch.uint16),  # as token files are stored
        IDS.tolist(),
        IDS.numpy().astype(np.int16),
        {"input_ids": IDS},
        {"input_ids": IDS[0].tolist(), "text": "a row of a dataset", "words": ["a", "row"], "none": []},
        {"input_ids": IDS.numpy(), "attention_mask": np.ones((1, 8))},
        {
            "input_ids": IDS.numpy(),
            "text": np.array(["words"]),
            "messages": [{"role": "user"}],
            "x": [None],
        },
    ],
    ids=range(9),
)
def test_the_same_tokens(batch: Any) -> None:
    for values in as_batches([batch] * 2, CPU):
        ids: Tensor = values["input_ids"]
        assert ids.dtype in (torch.int32, torch.int64) and torch.equal(ids, IDS.to(ids.dtype))
        assert values.keys() <= {"input_ids", "attention_mask"} and rows_of(values) == 8


def test_one_batch_is_split_into_its_rows() -> None:
    batch = {"input_ids": IDS.view(4, 2), "attention_mask": torch.ones(4, 2), "scale": torch.tensor(2.0)}
    found = as_batches([batch], CPU)
    assert [b["input_ids"].tolist() for b in found] == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert all(b["scale"] == 2.0 for b in found)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (7, "batches is a int; expected an iterable"),
        ("text", "batches is a str"),
        ({"input_ids": IDS}, "batches is a dict"),
        ([], "at least 2 batches"),
        ([IDS], "at least 2 batches .* got 1"),
        (["text", "text"], "batch 0 holds no tensor in 'input_ids'"),
        ([None, None], "batch 0 holds no tensor"),
        ([IDS, [[1, 2, 3], [4, 5]]], "batch 1 holds no tensor in 'input_ids' .*rows of one length: pad them"),
        ([IDS, {"input_ids": [[1, 2, 3], [4, 5]]}], "batch 1 holds no tensor in 'input_ids' .*of one length"),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(1, 7)}] * 2,
            r"shape \(1, 8\) and attention_mask of .*\(1, 7",
        ),
        ([{"input_ids": IDS, "token_type_ids": IDS[:, :3]}] * 2, "and token_type_ids of shape"),
        ([{"input_ids": IDS.view(4, 2), "pixels": torch.rand(3, 2)}], "'pixels': 3.* cannot be split"),
        ([IDS.float()] * 2, "torch.float32 tensor .*expected integer token ids"),
        ([{"input_ids": IDS.float()}] * 2, "torch.float32 tensor .*expected integer token ids"),
        ([IDS.bool()] * 2, "torch.bool tensor"),
        ([IDS.to(torch.complex64)] * 2, "torch.complex64 tensor"),
        ([[[1.5, 2.5]]] * 2, "torch.float32 tensor"),
        ([[[1, 1 << 70]]] * 2, "batch 0 holds no tensor"),
        ([IDS.view(2, 2, 2)] * 2, r"shape \(2, 2, 2\)"),
        ([IDS[:, :0]] * 2, "batch 0 is empty"),
        ([{}] * 2, "batch 0 is empty"),
        ([{"input_ids": [], "labels": IDS}] * 2, "batch 0 is empty"),
        ([{"text": "words only"}] * 2, "batch 0 is empty"),
        ([{"x": torch.tensor([[1.0, torch.nan]])}] * 2, "batch 0 holds NaN in 'x'"),
    ],
)
def test_what_is_no_data_is_named(batches: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_batches(batches, CPU)


def test_a_mask_of_minus_infinity_is_data() -> None:
    masked = {"input_ids": IDS, "attention_mask": torch.full((1, 1, 8, 8), -torch.inf)}
    assert len(as_batches([masked] * 2, CPU)) == 2


def test_too_few_tokens_are_named() -> None:
    check_enough(LEAST_ROWS)
    with pytest.raises(ConfigError, match="holds 31 tokens; thresholds need at least 32"):
        check_enough(LEAST_ROWS - 1)
