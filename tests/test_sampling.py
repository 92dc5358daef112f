"""Text of the model's own: its shape, its seed, its errors, and that a plan can be fitted on it."""

import pytest
import torch
from support import VOCABULARY, tiny_llama, tokens
from torch import nn

import rana_compile
from rana_compile import ConfigError, own_text


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama()


def test_batches_are_reproducible_and_no_random_state_is_spent(model: nn.Module) -> None:
    before = torch.random.get_rng_state()
    batches = own_text(model, tokens=600, length=32, start=5)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [tuple(b.shape) for b in batches] == [(1, 32)] * 19
    ids = torch.cat(batches)
    assert (ids[:, 0] == 5).all() and 0 <= int(ids.min()) <= int(ids.max()) < VOCABULARY
    assert torch.equal(ids, torch.cat(own_text(model, tokens=600, length=32, start=5)))
    assert not torch.equal(ids, torch.cat(own_text(model, tokens=600, length=32, start=5, seed=1)))


def test_it_is_distributed_as_the_model_says(model: nn.Module) -> None:
    """Second tokens against the model's distribution after the first: mean log-probability within its own error."""
    sampled = torch.cat(own_text(model, tokens=4000, length=2, start=5))[:, 1]
    with torch.no_grad():
        logs = model(torch.tensor([[5]])).logits[0, 0].log_softmax(-1)
    entropy = -(logs.exp() * logs).sum()
    error = ((logs.exp() * (logs + entropy).square()).sum() / len(sampled)).sqrt()
    assert abs(-logs[sampled].mean() - entropy) < 4 * error


def test_calibrate_on_own_text_alone_and_beside_other(model: nn.Module) -> None:
    mine = own_text(model, tokens=256, length=32)
    for batches in (mine, [*tokens(4), *mine]):
        plan = rana_compile.calibrate(model, batches, flops_budget=0.6, progress=False)
        assert plan.flops_kept == pytest.approx(0.6, rel=0.01)


def test_errors(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Linear cannot generate text"):
        own_text(nn.Linear(2, 2))
    for bad in ({"tokens": 0}, {"length": 1}):
        with pytest.raises(ConfigError, match="expected at least"):
            own_text(model, **bad)
    monkeypatch.setattr(model.generation_config, "bos_token_id", None)
    with pytest.raises(ConfigError, match="pass start="):
        own_text(model)
