"""Values kept in memory: computed once, the same numbers wherever they are in it, and none that is mapped over."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import graph_of
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code

from rana_compile.passes import attend
from rana_compile.passes.attend import lower_single_queries
from rana_compile.passes.memory import in_memory


def inputs(queries: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 6, n, 16, generator=own) for n in (queries, 40, 40))  # type: ignore[return-value]


class Sine(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2).sin().transpose(1, 2), k, v)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_makes_a_query_is_not_computed_for_each_key(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()

    def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        assert lower_single_queries(gm) == 1
        return compile_fx(gm, example_inputs, config_patches={"fx_graph_cache": False})

    def is_inside_of_the_sums() -> bool:
        torch._dynamo.reset()
        with torch.no_grad():
            result, codes = run_and_get_code(torch.compile(Sine(), backend=compiler, dynamic=dynamic), *given)
        torch.testing.assert_close(result, Sine()(*given))
        return codes[0].index("tmp_acc") < codes[0].index("sin(")

    assert not is_inside_of_the_sums()
    monkeypatch.setattr(attend, "can_be_kept", lambda _: False)
    assert is_inside_of_the_sums()


class Queries(nn.Module):
    """Queries that are a part of what made them, or not all in memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "the last token of a prompt":
            q = x.sin()[:, :, -1:]
        elif self.kind == "the middle of what was projected":
            q = (x.reshape(2, 1, -1) * 2).split(96, -1)[1].view(2, 1, 6, 16).transpose(1, 2)
        elif self.kind == "the same for each head":
            q = x.sin()[:, :1, :1].expand(2, 6, 1, 16)
        elif self.kind == "a batch of several":
            q = x.permute(3, 2, 1, 0).sin().permute(3, 2, 1, 0)[1:][:, :, :1].expand(2, 6, 1, 16)
        elif self.kind == "a part of the input":
            q = x[:, :, 1:2]
        else:
            x = x.clone()
            q = x[:, :, 1:2]
            attended = F.scaled_dot_product_attention(q, k, v)
            x.add_(1)
            return attended + F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        *("the last token of a prompt", "the middle of what was projected", "the same for each head"),
        *("a batch of several", "a part of the input", "written between"),
    ],
)
def test_queries_that_are_a_part_of_something(kind: str, dynamic: bool) -> None:
    def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        assert lower_single_queries(gm) == (2 if kind == "written between" else 1)
        return compile_fx(gm, example_inputs)

    module, (x, k, v) = Queries(kind), inputs(queries=3)
    with torch.no_grad():
        found = torch.compile(module, backend=compiler, dynamic=dynamic)(x, k, v)
        torch.testing.assert_close(found, module(x, k, v))


def test_a_query_that_is_mapped_over_stays_where_it_is() -> None:
    given, found = inputs(), []

    def compiler(gm: fx.GraphModule, _: list[Any]) -> Any:
        found.append(lower_single_queries(gm))
        assert in_memory not in {node.target for node in gm.graph.nodes}
        return gm.forward

    mapped = torch.compile(torch.vmap(Sine()), backend=compiler)
    torch.testing.assert_close(mapped(*(t[None] for t in given))[0], Sine()(*given))
    assert found == [1]


def test_a_part_of_what_a_product_made_stays_where_it_is() -> None:
    """It is in memory anyway, and of an adapter's outputs the graph does not know how."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(96, 96)

        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = self.project(x.reshape(2, 1, 96)).view(2, 1, 6, 16).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v)

    gm = graph_of(Projected(), *inputs())
    assert lower_single_queries(gm) == 1
    assert in_memory not in {node.target for node in gm.graph.nodes}
