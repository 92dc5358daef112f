"""The helpers for other people's suites: the documentation's examples pass, and each helper fails with a diff."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import blocks
from torch import nn

import rana_compile
from rana_compile import testing

PAGE = Path(__file__).parents[1] / "docs/testing.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(text for _, text in blocks(PAGE, "python")), names)
    return names


@pytest.mark.parametrize("name", ["test_sites", "test_rewrites", "test_graph", "test_nothing_is_compiled_again"])
def test_examples_of_the_page(page: dict[str, Any], name: str) -> None:
    page[name]()


def test_every_example_is_run(page: dict[str, Any]) -> None:
    assert sum(name.startswith("test_") for name in page) == 4


def test_missing_and_unexpected_sites_are_named(page: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=r"not found: \[\('up', 'linear'\)\]; found but .* 'gate_up'\)\]"):
        testing.assert_sites(page["Mlp"](), {"up": "linear", "down": "down"}, page["X"])


def test_other_graphs_and_rewrites_fail_with_a_diff(page: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    (gm,) = testing.graphs_of(model, page["X"])
    with pytest.raises(AssertionError, match=r"(?s)-%0 = matmul\(x\).*\+%0 = linear\(args_0, 0.weight, 0.bias\)"):
        testing.assert_graph(gm.graph, "%0 = matmul(x)\n%1 = output([%0])")
    plan = rana_compile.calibrate(model, [{"input": torch.randn(64, 64)} for _ in range(4)], 0.5, progress=False)
    with pytest.raises(AssertionError, match=r"(?s)-rana_rank.*\+rana_"):
        testing.assert_rewrites(model, plan, ["rana_rank_of_another"], page["X"])


def test_breaks_are_counted() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with testing.count_compilations() as counts:
        torch.compile(broken, backend="eager")(torch.randn(3))
    assert (counts.graphs, counts.breaks) == (2, 1)
