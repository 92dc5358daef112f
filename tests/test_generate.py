"""generate, as people call it: the compiled model gives the tokens of the adapted model run eagerly."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import OLD_DYNAMO, tiny_llama, tokens
from tiny_models import build, mask_by_hooks
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan


def run_eagerly(model: nn.Module, plan: Plan) -> nn.Module:
    """A model whose linears see masked inputs, by hooks: no compiler anywhere."""
    other = copy.deepcopy(model)
    mask_by_hooks(other, plan)
    return other


def compiled(model: nn.Module, plan: Plan, **options: Any) -> nn.Module:
    other = copy.deepcopy(model)
    other.compile(backend="rana", options={"plan": plan, "compiler": "eager", **options})
    return other


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    defaults = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **(defaults | settings))


SETTINGS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beam search": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 127},  # transformers 5.0 cannot do without one
}


@pytest.mark.parametrize("how", SETTINGS)
def test_same_tokens_as_the_formulas(model: nn.Module, plan: Plan, how: str) -> None:
    ids = tokens(1, length=11, seed=5)[0]
    expected = generate(run_eagerly(model, plan), ids, **SETTINGS[how])
    assert torch.equal(generate(compiled(model, plan), ids, **SETTINGS[how]), expected)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_left_padded_batch(model: nn.Module, plan: Plan, cache: str | None) -> None:
    ids = torch.cat(tokens(3, length=10, seed=6))
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, :2] = 0, 0
    expected = generate(run_eagerly(model, plan), ids, mask, cache_implementation=cache)
    assert torch.equal(generate(compiled(model, plan), ids, mask, cache_implementation=cache), expected)


def test_sliding_window_cache() -> None:
    model, _ = build("Mistral", layers=1)
    plan = rana_compile.calibrate(model, tokens(6), flops_budget=0.6, recipe="neuron", progress=False)
    ids = tokens(1, length=20, seed=5)[0]  # longer than the window of 16
    for cache in (None, "static"):
        expected = generate(run_eagerly(model, plan), ids, cache_implementation=cache)
        assert torch.equal(generate(compiled(model, plan), ids, cache_implementation=cache), expected)


def test_assisted_generation(model: nn.Module, plan: Plan) -> None:
    """The assistant is a second compiled model in the same loop."""
    torch.manual_seed(3)
    assistant = tiny_llama(layers=1)
    small = rana_compile.calibrate(assistant, tokens(4), flops_budget=0.6, recipe="neuron", progress=False)
    ids = tokens(1, length=11, seed=5)[0]
    expected = generate(run_eagerly(model, plan), ids)
    got = generate(compiled(model, plan), ids, assistant_model=compiled(assistant, small))
    assert torch.equal(got, expected)


def unpack(packed: Tensor, bits: int) -> Tensor:
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


def test_quantised_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo breaks the model at every layer's cache, and lets the layers share the graphs between."""
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions import extension

    without_building = SimpleNamespace(unpack=unpack)  # its C++ takes a minute
    monkeypatch.setattr(extension.get_extension("quanto_cpp"), "_lib", without_building)
    torch.manual_seed(0)
    model = tiny_llama(layers=2)
    plan = rana_compile.calibrate(model, tokens(6), flops_budget=0.6, recipe="neuron", progress=False)
    ids = tokens(1, length=11, seed=5)[0]

    def generated(model: nn.Module) -> Tensor:
        config = {"backend": "quanto", "nbits": 4, "q_group_size": 32}
        return generate(model, ids, cache_implementation="quantized", cache_config=config)

    expected = generated(run_eagerly(model, plan))
    stock = copy.deepcopy(model)
    stock.compile(backend="eager")
    try:
        generated(stock)
    except torch._dynamo.exc.InternalTorchDynamoError as error:
        if not OLD_DYNAMO:
            raise
        pytest.skip(f"Dynamo of torch {torch.__version__} cannot trace this cache, whatever the backend: {error}")
    torch._dynamo.reset()  # graphs of the other model count towards a function's limit
    assert torch.equal(generated(compiled(model, plan)), expected)
    assert not torch.equal(generated(model), expected)


def test_generate_of_a_wrapper_uses_what_was_compiled(model: nn.Module, plan: Plan) -> None:
    ids = tokens(1, length=11, seed=5)[0]
    expected = generate(run_eagerly(model, plan), ids)
    assert not torch.equal(expected, generate(model, ids))
    wrapper = torch.compile(model, backend="rana", options={"plan": plan, "compiler": "eager"})
    assert torch.equal(generate(wrapper, ids), expected)
    assert not torch.equal(generate(model, ids), expected)  # the module itself is as it was


def test_other_wrappers_are_left_alone(model: nn.Module, plan: Plan) -> None:
    torch.compile(model, backend="rana", options={"plan": plan})  # the property is in place from here on
    wrapper = torch.compile(model, backend="eager")
    assert wrapper.generate == model.generate
    with pytest.raises(AttributeError, match="generate"):
        torch.compile(nn.Linear(2, 2), backend="rana").generate  # noqa: B018
