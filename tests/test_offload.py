"""Models that accelerate spreads over memory and disk are calibrated one weight at a time, to the same plan."""

import weakref
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from support import tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile.offload import Weights
from rana_compile.types import ConfigError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(layers=3)


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> rana_compile.Plan:
    return fitted(model)


def fitted(model: nn.Module) -> rana_compile.Plan:
    return rana_compile.calibrate(model, tokens(6), 0.6, exclude="lm_head", progress=False)


def offloaded(model: nn.Module, how: str, folder: Path) -> nn.Module:
    copied = deepcopy(model)
    if how == "cpu":
        return cpu_offload(copied, execution_device="cpu", offload_buffers=True)
    if how == "disk":
        return disk_offload(copied, folder, execution_device="cpu")
    if how == "preloaded":  # a hook that places a block's parameters, not its own alone
        return cpu_offload(copied, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"])
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread |= {f"model.layers.{i}": "disk" for i in range(3)}
    if how == "map":
        return dispatch_model(copied, spread, main_device="cpu", offload_dir=folder)
    copied.save_pretrained(folder / "saved")
    return type(copied).from_pretrained(folder / "saved", device_map=spread, offload_folder=folder / "rest").eval()


@pytest.mark.parametrize("how", ["cpu", "disk", "map", "preloaded", "loaded"])
def test_an_offloaded_model_gets_the_plan_of_one_in_memory(
    model: nn.Module, expected: rana_compile.Plan, how: str, tmp_path: Path
) -> None:
    away = offloaded(model, how, tmp_path)
    places = {name: p.device.type for name, p in away.named_parameters()}
    assert "meta" in places.values()
    before = away(input_ids=tokens(1)[0]).logits

    assert fitted(away).digest() == expected.digest()

    assert {name: p.device.type for name, p in away.named_parameters()} == places
    assert torch.equal(away(input_ids=tokens(1)[0]).logits, before)  # its hooks work as before


def test_what_measures_plans_takes_offloaded_models(model: nn.Module, expected: rana_compile.Plan) -> None:
    away, ids = cpu_offload(deepcopy(model), execution_device="cpu"), tokens(2)[0]
    with rana_compile.adapted(model, expected) as run, rana_compile.adapted(away, expected) as far:
        assert torch.equal(run(input_ids=ids).logits, far(input_ids=ids).logits)
        run(input_ids=tokens(2)[1])
    assert rana_compile.measure_cost(away, expected, tokens(2)) == run.flops_kept
    assert len(rana_compile.explain(away, input_ids=ids).sites) == len(expected.sites) + 1  # lm_head's
    again = rana_compile.refit(away, tokens(6), expected, progress=False)
    assert again.digest() == rana_compile.refit(model, tokens(6), expected, progress=False).digest()


class Counted(Mapping[str, Tensor]):
    """Offloaded weights that know how many of their bytes are in memory."""

    def __init__(self, held: Mapping[str, Tensor], count: dict[str, int]) -> None:
        self._held, self._count = held, count

    def __getitem__(self, name: str) -> Tensor:
        value = self._held[name].clone()
        self._count["now"] += value.nbytes
        self._count["most"] = max(self._count.values())
        weakref.finalize(value.untyped_storage(), self._gone, value.nbytes)
        return value

    def _gone(self, size: int) -> None:
        self._count["now"] -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def test_few_weights_are_in_memory_at_once(model: nn.Module, expected: rana_compile.Plan) -> None:
    away = cpu_offload(deepcopy(model), execution_device="cpu")
    count = {"now": 0, "most": 0}
    for module in away.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
            hook.weights_map = Counted(hook.weights_map, count)
    assert fitted(away).digest() == expected.digest()
    block = sum(p.nbytes for p in model.get_submodule("model.layers.0").parameters())
    assert 0 < count["most"] <= block  # of three, forward and backward
    assert count["now"] == 0


def test_an_interrupted_calibration_leaves_an_offloaded_model_as_it_was(model: nn.Module) -> None:
    away = cpu_offload(deepcopy(model), execution_device="cpu")
    forwards = {m: m.__dict__["forward"] for m in away.modules() if "forward" in m.__dict__}

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rana_compile.calibrate(away, tokens(6), 0.6, recipe=interrupted, progress=False)
    assert {m: m.__dict__["forward"] for m in away.modules() if "forward" in m.__dict__} == forwards
    assert all(p.is_meta for p in away.parameters())


def test_weights_that_were_never_loaded_are_an_error() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ConfigError, match=r"0\.weight has no values.* never loaded; use from_pretrained"):
        rana_compile.calibrate(empty, [torch.zeros(2, 64)] * 4, 0.6)
    assert Weights(nn.Linear(2, 2)).device == torch.device("cpu")


class Shared(nn.Module):
    """Layers under two names, and a parameter that is a linear's input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(5))
        self.again = nn.ModuleList(self.layers)
        self.query = nn.Parameter(torch.randn(64, 64))
        self.reader = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.again:
            x = x + layer(x).relu()
        return x + self.reader(self.query)


def test_modules_of_two_names_and_parameters_as_inputs() -> None:
    torch.manual_seed(0)
    model, data = Shared().eval(), [{"x": torch.randn(64, 64)} for _ in range(6)]
    expected = rana_compile.calibrate(model, data, 0.6, progress=False)
    away = cpu_offload(deepcopy(model), execution_device="cpu")
    assert rana_compile.calibrate(away, data, 0.6, progress=False).digest() == expected.digest()
    with rana_compile.adapted(model, expected) as run, rana_compile.adapted(away, expected) as far, torch.no_grad():
        torch.testing.assert_close(far(**data[0]), run(**data[0]), rtol=0, atol=0)


def test_weights_are_not_loaded_for_their_dtype(model: nn.Module) -> None:
    away = cpu_offload(deepcopy(model), execution_device="cpu")
    count = {"now": 0, "most": 0, "reads": 0}
    for module in away.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
            hook.weights_map = Reads(hook.weights_map, count)
    rana_compile.calibrate(away, tokens(6), 0.6, "neuron", exclude="lm_head", progress=False)
    by_flops, count["reads"] = count["reads"], 0
    rana_compile.calibrate(away, tokens(6), recipe="neuron", bytes_budget=0.6, exclude="lm_head", progress=False)
    assert 0 < count["reads"] <= 1.5 * by_flops  # a search may refit once more


class Reads(Counted):
    def __getitem__(self, name: str) -> Tensor:
        self._count["reads"] += 1
        return self._held[name]
