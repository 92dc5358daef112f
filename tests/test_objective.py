"""The loss on a text's own next tokens: which tokens those are, and by how much it rises."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_llama
from torch import Tensor, nn

from rana_compile import objective
from rana_compile.objective import NO_LABEL, distances, divergence, next_tokens, writes_text
from rana_compile.types import RanaError


@pytest.fixture(params=[1, 24, 1 << 22], ids=["a row at once", "some rows", "all rows"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "AT_ONCE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_those_of_the_formulas(parts: None, dtype: torch.dtype) -> None:
    dense, adapted = (torch.randn(2, 5, 11, dtype=dtype) for _ in range(2))
    labels = torch.randint(11, (2, 5))
    labels[0, 3] = labels[1, 4] = NO_LABEL
    p, q = (z.double().log_softmax(-1) for z in (dense, adapted))
    each, known = (p.exp() * (p - q)).sum(-1), labels != NO_LABEL
    of_labels = (p - q)[known].gather(1, labels[known][:, None])
    expected = float(each.mean()), float(each[known].sum()), float(of_labels.sum())
    assert distances(dense, adapted, labels) == pytest.approx(expected, rel=1e-4)


def test_rows_without_a_label_do_not_count(parts: None) -> None:
    dense, adapted = (torch.randn(2, 5, 11) for _ in range(2))
    expected = divergence(dense, adapted), 0, 0
    assert distances(dense, adapted, torch.full((2, 5), NO_LABEL)) == distances(dense, adapted) == expected


def test_a_row_that_rules_everything_out_is_an_error() -> None:
    logits = torch.zeros(3, 5, requires_grad=True)
    ruled_out = (logits + 0).index_fill(0, torch.tensor([1]), -torch.inf)
    with pytest.raises(RanaError, match="NaN or infinity"):
        objective.differentiate(SimpleNamespace(logits=ruled_out), torch.Generator())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_next_tokens_are_those_that_follow_and_no_padding(dtype: torch.dtype) -> None:
    ids, logits = torch.tensor([[4, 5, 6, 0], [0, 7, 8, 9]], dtype=dtype), torch.zeros(2, 4, 16)
    x = NO_LABEL

    def found(width: int = 16, **more: Tensor) -> Any:
        labels = next_tokens({"input_ids": ids, **more}, logits[..., :width])
        assert labels is not None and labels.dtype == torch.int64
        return labels.tolist()

    assert found() == [[5, 6, 0, x], [7, 8, 9, x]]
    assert found(attention_mask=torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])) == [[5, 6, x, x], [x, 8, 9, x]]
    assert found(width=8) == [[5, 6, 0, x], [7, x, x, x]]  # more tokens than logits
    assert ids.tolist() == [[4, 5, 6, 0], [0, 7, 8, 9]]


@pytest.mark.parametrize(
    "batch",
    [
        {"input": torch.zeros(2, 4)},
        {"input_ids": torch.zeros(2, 5, dtype=torch.long)},
        {"input_ids": torch.zeros(2, 4, dtype=torch.long), "pixel_values": torch.zeros(2, 3, 8, 8)},
        {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 4, 4)},
    ],
    ids=["no tokens", "another length", "images", "a mask of pairs"],
)
def test_other_batches_have_no_next_tokens(batch: dict[str, Tensor]) -> None:
    assert next_tokens(batch, torch.zeros(2, 4, 16)) is None


def others() -> list[Any]:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 64, "num_hidden_layers": 1, "num_layers": 1}
    bert = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **small)
    t5 = T5Config(d_model=16, d_kv=8, num_heads=2, d_ff=16, **small)
    return [BertForMaskedLM(bert), T5ForConditionalGeneration(t5), nn.Linear(2, 2)]


def test_what_transformers_lets_write_text_alone() -> None:
    assert writes_text(tiny_llama(1))
    assert not any(map(writes_text, others()))
