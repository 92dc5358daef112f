"""What tells that weights changed since the last call."""

import torch
from torch import Tensor

from rana_compile.binding import stamp


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
