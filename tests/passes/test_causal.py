"""Causal masks that are written out: recognised where they are constant, and never taken for what they are not."""

import operator
from collections.abc import Callable
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import graph_of, tiny_llama, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan
from rana_compile.passes.attend import SDPA, arguments
from rana_compile.passes.causal import COMPARISONS, lower_causal_masks

N = 8


class Attend(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor], positional: bool = False, **given: object) -> None:
        super().__init__()
        self.mask, self.positional, self.given = mask, positional, given

    def forward(self, q: Tensor) -> Tensor:
        if self.positional:
            return F.scaled_dot_product_attention(q, q, q, self.mask(q))
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask(q), **self.given)


def steps(q: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])


def written_out(q: Tensor) -> Tensor:
    return steps(q)[None, None, None] <= steps(q)[:, None]


def numbers(q: Tensor, forbidden: float = -torch.inf, allowed: float = 0.0) -> Tensor:
    return torch.full((N, N), allowed).masked_fill(~written_out(q), forbidden)


def window(q: Tensor, size: int | Tensor) -> Tensor:
    return written_out(q) & (steps(q) > steps(q)[:, None] - size)


def in_place(q: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[0, 1] = True
    return mask


def through_a_view(q: Tensor) -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[:, :3].fill_(True)  # of a prefix everything is seen
    return mask


def numbers_through_a_view(q: Tensor) -> Tensor:
    mask = torch.full((N, N), -torch.inf).triu(1)
    mask[0].zero_()
    return mask


def mapped(q: Tensor) -> Tensor:
    seen = torch.vmap(torch.vmap(lambda i, j: j <= i, (None, 0)), (0, None))
    return seen(steps(q), steps(q))


def lowered(module: nn.Module, q: Tensor) -> tuple[int, Tensor]:
    gm = graph_of(module, q)
    count = lower_causal_masks(gm)
    for node in gm.graph.nodes:
        if node.target is SDPA and count:
            assert arguments(node)["is_causal"] and arguments(node)["attn_mask"] is None
    return count, gm(q)[0]


@pytest.mark.parametrize(
    "module",
    [
        Attend(written_out),
        Attend(written_out, positional=True),
        Attend(written_out, scale=0.3, dropout_p=0.0, is_causal=False),
        Attend(lambda q: written_out(q) & (torch.ones(N).cumsum(0) > 0).expand(2, 1, N, N)),
        Attend(numbers),
        Attend(lambda q: numbers(q, torch.finfo(torch.float32).min)),
        Attend(lambda q: window(q, N)),
    ],
)
def test_a_constant_causal_mask_is_said_in_one_bit(module: nn.Module) -> None:
    q = torch.randn(2, 3, N, 16)
    count, found = lowered(module, q)
    assert count == 1
    torch.testing.assert_close(found, module(q))


@pytest.mark.parametrize(
    "module",
    [
        Attend(lambda q: written_out(q) & (q[:1, :1, :, :1] < 100)),  # depends on an input
        Attend(lambda q: window(q, N - 1)),
        Attend(lambda q: ~written_out(q)),
        Attend(lambda q: numbers(q, -5.0)),
        Attend(lambda q: numbers(q, allowed=1.0)),
        Attend(lambda q: written_out(q) & (torch.rand(N, N) < 2)),  # as it happens
        Attend(in_place),
        Attend(through_a_view),
        Attend(numbers_through_a_view),
        Attend(mapped),
    ],
    ids=[
        *("input", "window", "the other half", "not minus infinity", "not zero", "random", "changed in place"),
        *("changed through a view", "numbers changed through a view", "of vmap"),
    ],
)
def test_others_are_left_alone(module: nn.Module) -> None:
    q = torch.randn(2, 3, N, 16)
    count, found = lowered(module, q)
    assert count == 0
    torch.testing.assert_close(found, module(q))


def positions(q: Tensor) -> Tensor:
    """As transformers has them, without gaps."""
    return (steps(q) + 0).unsqueeze(0).expand(q.shape[0], -1)


def unpacked(q: Tensor) -> Tensor:
    """Of one sequence each, as transformers finds out from positions."""
    at = positions(q)
    part = (torch.diff(at, prepend=at[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    sequence = torch.arange(q.shape[0])[:, None, None, None]
    rows, cols = steps(q)[None, None, :, None], steps(q)[None, None, None]
    same = part[sequence, rows] == part[sequence, cols]
    return rows.new_ones((), dtype=torch.bool) & (cols <= rows) & same


def in_prefix(q: Tensor, size: int) -> Tensor:
    return written_out(q) | (steps(q) < size)


def doubled(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = x + x
    return x


def counts(q: Tensor) -> Tensor:
    """Of the positions from 20 on."""
    return (steps(q) >= 20).cumsum(0)


CAUSAL: dict[str, Callable[[Tensor], Tensor]] = {
    "written out": written_out,
    "one sequence": unpacked,
    "of each sequence": lambda q: unpacked(q).expand(q.shape[0], -1, q.shape[2], q.shape[2]),
    "an empty prefix": lambda q: in_prefix(q, 0),
    "by methods": lambda q: steps(q).__le__(steps(q)[:, None]) & counts(q).__ge__(0),
    "any count": lambda q: written_out(q) & (counts(q)[steps(q)] >= 0),
}
NOT_CAUSAL: dict[str, Callable[[Tensor], Tensor]] = {
    "a window": lambda q: window(q, 5),
    "a longer window": lambda q: window(q, 30),
    "a window too long to try": lambda q: window(q, 20_000),
    "a prefix": lambda q: in_prefix(q, 3),
    "one further": lambda q: steps(q) <= steps(q)[:, None] + 1,
    "up to an end": lambda q: written_out(q) & (steps(q) < 140.5),
    "chunks": lambda q: written_out(q) & (steps(q) // 100 == steps(q)[:, None] // 100),
    "another sequence": lambda q: written_out(q) & (torch.arange(q.shape[0])[:, None, None, None] < 5),
    "as many sequences": lambda q: written_out(q) & (steps(q) != q.shape[0]),
    "from the end": lambda q: written_out(q) & (steps(q)[-1:] != 6),
    "with the size": lambda q: written_out(q) & (steps(q) + q.shape[-2] != 9),
    "downwards": lambda q: written_out(q) & (torch.arange(q.shape[-2], 0, -1)[:1] != 7),
    "every fifth": lambda q: written_out(q) & (steps(q)[::5][-1:] != steps(q)[-1:]),
    "a sum": lambda q: window(q, torch.arange(20).cumsum(0)[19]),
    "doubled": lambda q: window(q, doubled(torch.arange(2)[1], 7)),
    "squares": lambda q: written_out(q) & (steps(q).cumsum(0) <= doubled(steps(q), 6))[:, None],
    "around the end": lambda q: written_out(q) & (steps(q)[steps(q) - 7] != 0),
    "a count": lambda q: written_out(q) & (counts(q)[steps(q)] < 50),
    "lookups of lookups": lambda q: written_out(q) & (counts(q)[counts(q)][counts(q)] < 50),
    "bits": lambda q: written_out(q) & ((steps(q) & doubled(torch.arange(2)[1], 7)) == 0),
    "after itself": lambda q: written_out(q) & (torch.diff(steps(q), prepend=steps(q))[steps(q)] > -40),
    "a number by a method": lambda q: written_out(q) & steps(q).__ne__(140),
    "against a number": lambda q: written_out(q) & (140 - steps(q) > 0),
    "an input": lambda q: written_out(q) & (q[:1, :1, :, :1] < 100),
    "of few bits": lambda q: written_out(q) & (steps(q).to(torch.int8) > -1),
}
CASES = [(mask, 1) for mask in CAUSAL.values()] + [(mask, 0) for mask in NOT_CAUSAL.values()]


@pytest.mark.parametrize(("mask", "count"), CASES, ids=[*CAUSAL, *NOT_CAUSAL])
def test_with_symbolic_sizes_a_mask_is_causal_if_it_is_for_all(mask: Callable[[Tensor], Tensor], count: int) -> None:
    found = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.append(lower_causal_masks(gm))
        return gm

    module = Attend(mask)
    compiled = torch.compile(module, backend=compiler, dynamic=True)
    for shape in [(2, 3, N, 16), (3, 3, 7, 16), (3, 3, 46, 16), (7, 3, 150, 16)]:
        q = torch.randn(shape)
        torch.testing.assert_close(compiled(q), module(q))
    assert found == [count]


def test_a_mask_for_more_sequences_than_queries_is_left_alone() -> None:
    class More(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, attn_mask=written_out(q).expand(2, 1, N, N))

    assert lower_causal_masks(graph_of(More(), torch.randn(1, 3, N, 16), torch.randn(2, 3, N, 16))) == 0


def test_what_is_written_elsewhere_stays() -> None:
    class Counting(Attend):
        def __init__(self) -> None:
            super().__init__(written_out)
            self.register_buffer("seen", torch.zeros(3))
            self.register_buffer("cache", torch.zeros(N, 4))

        def forward(self, q: Tensor) -> Tensor:
            self.seen.add_(1)
            self.cache.index_copy_(0, steps(q), q[0, 0])
            return super().forward(q)

    module, q = Counting(), torch.randn(1, 1, N, 4)
    plan = Plan((), (), 0.5, 1.0)
    fast = torch.compile(module, backend="rana", options={"plan": plan, "compiler": "aot_eager"})
    with torch.no_grad():
        fast(q), fast(q)
    assert torch.equal(module.seen, torch.full((3,), 2.0)) and torch.equal(module.cache, q[0, 0])


def test_more_keys_than_queries_are_left_alone() -> None:
    class Longer(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            mask = torch.arange(N) <= torch.arange(N // 2)[:, None]
            return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    assert lower_causal_masks(graph_of(Longer(), torch.randn(1, 2, N // 2, 4), torch.randn(1, 2, N, 4))) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_prompt_gives_what_it_gave(dynamic: bool) -> None:
    model = tiny_llama()
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    fast = torch.compile(model, backend="rana", dynamic=dynamic, options={"plan": plan})
    with torch.no_grad():
        for count, length in [(1, 24), (1, 41)] if dynamic else [(1, 24)]:
            ids = torch.cat(tokens(count, length=length, seed=3))
            with rana_compile.adapted(model, plan) as run:
                expected = run(input_ids=ids).logits
            torch.testing.assert_close(fast(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def some_positions(random: Random, depth: int) -> Callable[[Tensor], Tensor]:
    """Of positions [n]: other numbers [n]."""
    kind = random.choice(["themselves", "moved", "counted", "looked up"]) if depth else "themselves"
    if kind == "themselves":
        return lambda x: x
    inner = some_positions(random, depth - 1)
    if kind == "moved":
        number, move = random.randint(0, 40), random.choice([operator.add, operator.sub])
        return lambda x: move(inner(x), number)
    if kind == "looked up":
        return lambda x: inner(x)[x]
    true = some_truths(random, depth - 1)
    return lambda x: true(x).cumsum(-1)


def some_truths(random: Random, depth: int) -> Callable[[Tensor], Tensor]:
    one, other = (some_positions(random, depth) for _ in range(2))
    compare, number = random.choice(sorted(COMPARISONS, key=str)), random.randint(-5, 60)
    if random.random() < 0.5:
        return lambda x: compare(one(x), number)
    return lambda x: compare(one(x), other(x))


def some_mask(random: Random) -> Callable[[Tensor], Tensor]:
    one, other = (some_positions(random, 2) for _ in range(2))
    compare, true = random.choice(sorted(COMPARISONS, key=str)), some_truths(random, 2)
    join, more = random.choice([operator.and_, operator.or_]), random.random() < 0.7
    if random.random() < 0.5:
        return lambda x: join(x <= x[:, None], true(x)[:, None] if more else true(x))
    return lambda x: join(x <= x[:, None], compare(one(x), other(x)[:, None]))


@given(st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_no_mask_is_taken_for_causal_that_is_not(random: Random) -> None:
    mask, found = some_mask(random), []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.append(lower_causal_masks(gm))
        return gm

    torch.compiler.reset()
    torch.compile(Attend(lambda q: mask(steps(q))), backend=compiler, dynamic=True)(torch.randn(1, 2, 90, 4))
    if found == [1]:
        for n in [*range(2, 130), 200, 333, 700]:
            assert torch.equal(mask(torch.arange(n)), torch.ones(n, n, dtype=torch.bool).tril()), n


@pytest.mark.parametrize("count", [1, 3])
def test_transformers_mask_of_a_symbolic_length_is_recognised(count: int) -> None:
    found = []

    def compiler(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        found.append(lower_causal_masks(gm))
        return gm

    model = tiny_llama(2)
    ids = torch.cat(tokens(count, length=24))
    with torch.no_grad():
        torch.compile(model, backend=compiler, dynamic=True)(input_ids=ids, use_cache=False)
    assert found == [2]
