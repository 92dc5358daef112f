"""What tells that weights changed since the last call."""

import dataclasses

import pytest
import torch
from support import plan_of
from torch import Tensor, nn

from rana_compile.binding import Bound, stamp
from rana_compile.types import Site


def test_a_stamp_changes_with_writes_in_place_replaced_data_and_other_tensors() -> None:
    weights = [torch.ones(3, 3, requires_grad=True), torch.ones(2), torch.ones(2)]
    seen = [stamp(weights)]
    with torch.no_grad():
        weights[0].add_(1)
    seen.append(stamp(weights))
    weights[1].data = torch.zeros(2)  # replaced behind autograd's back: no version
    seen.append(stamp(weights))
    weights[2] = weights[2].clone()
    seen.append(stamp(weights))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert stamp(weights) == seen[-1]


def test_tensors_of_inference_mode_have_a_place_and_no_version() -> None:
    with torch.inference_mode():
        quiet: list[Tensor] = [torch.ones(2)]
    mixed = [*quiet, torch.ones(2).add_(1)]
    assert stamp(mixed) == ([w.data_ptr() for w in mixed], [0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_fitted_lies_in_one_aligned_copy_that_a_refit_overwrites(dtype: torch.dtype) -> None:
    linear = nn.Linear(19, 7)
    own = {"threshold": torch.rand(1, 19).to(dtype), "probe": torch.rand(1, 20)}
    site = Site("", "linear", ("weight",), 19, (7,))
    (entry,) = plan_of(linear, (site, "neuron", own)).sites
    bound = Bound(entry, [linear.weight])
    for name, tensor in own.items():
        view = bound.stored[name]
        assert torch.equal(view, tensor.float()) and view.is_contiguous() and view.storage_offset() % 4 == 0
        assert bound.fitted is not None and view.data_ptr() == bound.fitted.part(name).data_ptr()
    refitted = dataclasses.replace(entry, tensors=own | {"threshold": own["threshold"] * 2})
    bound.succeed(refitted)
    assert torch.equal(bound.fitted.tensor[:19], own["threshold"][0] * 2)
    assert torch.equal(entry.tensors["threshold"], own["threshold"])


def test_an_adapter_without_thresholds_has_nothing_fitted() -> None:
    linear = nn.Linear(19, 7)
    site = Site("", "linear", ("weight",), 19, (7,))
    (entry,) = plan_of(linear, (site, "low_rank", {"output_basis": torch.rand(7, 3)})).sites
    assert Bound(entry, [linear.weight]).fitted is None


@pytest.mark.parametrize("family", ["neuron", "gated"])
def test_stacked_weights_follow_the_users(family: str) -> None:
    module = nn.ModuleDict({"gate": nn.Linear(19, 7, bias=False), "up": nn.Linear(19, 7, bias=False)})
    site = Site("", "gate_up", ("gate.weight", "up.weight"), 19, (7, 7), activation="silu")
    one = {"threshold": torch.rand(1, 19), "gate_threshold": torch.rand(7), "probe": torch.zeros(0, 20)}
    tensors = one if family == "gated" else {"threshold": torch.rand(2, 19), "probe": torch.zeros(0, 20)}
    (entry,) = plan_of(module, (site, family, tensors)).sites
    weights = list(module.parameters())
    bound = Bound(entry, weights)
    stacked = bound.stacked(weights)
    with torch.no_grad():
        weights[1].mul_(1.1)
    assert not torch.equal(stacked, torch.cat(weights).t())
    bound.refresh(weights)
    assert torch.equal(stacked, torch.cat(weights).t()) and stacked.is_contiguous()
    assert bound.stacked(weights) is stacked and any(t is stacked for t in bound.buffers)
