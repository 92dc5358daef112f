"""The plain forms say what the ops mean: checked by hand and against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.kernels import reference
from rana_compile.types import RanaError

NAN = math.nan


def test_a_coordinate_is_dropped_below_its_threshold_only() -> None:
    z = torch.tensor([0.5, -0.5, 1.0, -2.0, 0.0])
    threshold = torch.tensor([0.5, 0.6, 0.5, 9.0, 0.0])
    assert reference.apply_threshold(z, threshold).tolist() == [0.5, 0.0, 1.0, 0.0, 0.0]


def test_nan_is_kept() -> None:
    kept = reference.apply_threshold(torch.tensor([NAN, 1.0]), torch.tensor([9.0, NAN]))
    assert kept[0].isnan() and kept[1] == 1.0
    assert reference.masked_linear(torch.tensor([NAN]), torch.tensor([9.0]), torch.ones(1, 2)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_accumulate_in_float32_and_keep_the_dtype(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 300), (7, 300), (7,)))
    y = reference.linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype))
    torch.testing.assert_close(reference.masked_linear(x, torch.zeros(300), weight.t().contiguous(), bias), y)


def test_float64_is_not_narrowed() -> None:
    x, weight = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(reference.linear(x, weight), x @ weight.t(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_linear_is_its_two_steps(dtype: torch.dtype) -> None:
    x, basis, weight_t = (torch.randn(*shape).to(dtype) for shape in ((2, 9), (5, 9), (5, 4)))
    threshold = torch.rand(5) * 3
    z = reference.linear(x, basis)
    assert z.dtype == dtype  # what is compared with the threshold
    expected = reference.masked_linear(z, threshold, weight_t)
    assert torch.equal(reference.rank_linear(x, basis, threshold, weight_t), expected)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
    ],
)
def test_gated_mlp_is_the_models(name: str, function) -> None:  # type: ignore[no-untyped-def]
    x, gate, up, down = torch.randn(2, 6), torch.randn(5, 6), torch.randn(5, 6), torch.randn(6, 5)
    up_bias, down_bias = torch.randn(10), torch.randn(6)
    keep = torch.zeros(6)
    y = reference.gated_mlp(x, keep, torch.cat([gate, up]).t(), up_bias, keep[:5], down.t(), down_bias, activation=name)
    hidden: Tensor = function(F.linear(x, gate, up_bias[:5])) * F.linear(x, up, up_bias[5:])
    torch.testing.assert_close(y, F.linear(hidden, down, down_bias))


def test_gated_mlp_masks_both_products() -> None:
    x, up, down = torch.tensor([1.0, 0.1]), torch.ones(2, 4), torch.ones(2, 3)
    keep, drop = torch.zeros(2), torch.full((2,), 9.0)
    dropped = reference.gated_mlp(x, torch.tensor([0.0, 0.5]), up, None, keep, down, None, "relu")
    assert dropped.tolist() == [2.0] * 3  # hidden = relu(1) * 1, twice
    assert reference.gated_mlp(x, keep, up, None, drop, down, None, "relu").tolist() == [0.0] * 3


def test_an_unknown_activation_names_the_known() -> None:
    with pytest.raises(RanaError, match="'swish'; known: silu, gelu, gelu_tanh, relu"):
        reference.check_activation("swish")
