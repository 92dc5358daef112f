"""The loss on a text's own next tokens: which tokens those are, and by how much it rises."""

from typing import Any

import pytest
import torch
from support import tiny_llama
from torch import Tensor, nn

from rana_compile import objective
from rana_compile.objective import NO_LABEL, divergence, loss_increase, next_tokens, predicts_next_tokens


@pytest.fixture(params=[1, 24, 1 << 22], ids=["a row at once", "some rows", "all rows"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "AT_ONCE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_those_of_the_formulas(parts: None, dtype: torch.dtype) -> None:
    dense, adapted = (torch.randn(2, 5, 11, dtype=dtype) for _ in range(2))
    labels = torch.randint(11, (2, 5))
    labels[0, 3] = labels[1, 4] = NO_LABEL
    p, q = (z.double().log_softmax(-1) for z in (dense, adapted))
    assert divergence(dense, adapted) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    known = labels != NO_LABEL
    of_labels = (p - q)[known].gather(1, labels[known][:, None])
    assert loss_increase(dense, adapted, labels) == pytest.approx(float(of_labels.sum()), rel=1e-4)


def test_next_tokens_are_those_that_follow_and_no_padding() -> None:
    ids, logits = torch.tensor([[4, 5, 6, 0], [0, 7, 8, 9]]), torch.zeros(2, 4, 16)
    x = NO_LABEL
    assert next_tokens({"input_ids": ids}, logits).tolist() == [[5, 6, 0, x], [7, 8, 9, x]]  # type: ignore[union-attr]
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])}
    assert next_tokens(padded, logits).tolist() == [[5, 6, x, x], [x, 8, 9, x]]  # type: ignore[union-attr]
    assert ids.tolist() == [[4, 5, 6, 0], [0, 7, 8, 9]]


@pytest.mark.parametrize("batch", [{"input": torch.zeros(2, 4)}, {"input_ids": torch.zeros(2, 5, dtype=torch.long)}])
def test_other_batches_have_no_next_tokens(batch: dict[str, Tensor]) -> None:
    assert next_tokens(batch, torch.zeros(2, 4, 16)) is None


def others() -> list[Any]:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 64, "num_hidden_layers": 1, "num_layers": 1}
    bert = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **small)
    t5 = T5Config(d_model=16, d_kv=8, num_heads=2, d_ff=16, **small)
    return [BertForMaskedLM(bert), T5ForConditionalGeneration(t5), nn.Linear(2, 2)]


def test_only_causal_models_predict_next_tokens() -> None:
    assert predicts_next_tokens(tiny_llama(1))
    assert not any(map(predicts_next_tokens, others()))
