"""Any plan is the same after a way through a file, to the bit."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from rana_compile import Plan
from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.plan import SitePlan
from rana_compile.types import Site, Skipped

SIZES = st.integers(1, 9)
SHARES = st.floats(1e-3, 2.0)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


def tensors_of(family: str, site: Site, rank: int, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    masks = 2 if family == "gated" else len(site.weights)
    shapes = {
        "threshold": (rank,) if family == "rank" else (1 if family == "gated" else masks, site.d_in),
        "gate_threshold": (site.d_outs[0],),
        "probe": (masks * (seed % 2), site.d_in + 1),
        "output_basis": (site.d_out, rank),
    }
    return {k: torch.rand(shapes[k], generator=generator) for k in FAMILIES[family].stored}


@st.composite
def site_plans(draw: Any, index: int) -> SitePlan:
    family = draw(st.sampled_from(["dense", *FAMILIES]))
    d_in, h = draw(SIZES), draw(SIZES)
    d_outs = (h, h) if family == "gated" else tuple(draw(st.lists(SIZES, min_size=1, max_size=3)))
    kind = "gate_up" if family == "gated" else "linear" if len(d_outs) == 1 else "stacked"
    weights = tuple(f"{index}.{i}.{draw(NAMES)}.weight" for i in range(len(d_outs)))
    block, activation = draw(st.none() | NAMES), "silu" if family == "gated" else None
    site = Site(draw(NAMES), kind, weights, d_in, d_outs, block, draw(st.booleans()), activation)  # type: ignore[arg-type]
    if family == "dense":
        return SitePlan(site, family, {}, (), 1.0, 0.0, "0" * 64)
    rank = draw(st.integers(1, min(site.d_out, d_in)))
    live = tuple(draw(st.floats(0, 1)) for _ in FAMILIES[family].mask_flops(site))
    tensors = tensors_of(family, site, rank, draw(st.integers(0, 1 << 20)))
    digest = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
    return SitePlan(site, family, tensors, live, draw(SHARES), draw(st.floats(0, 10)), digest)


@st.composite
def plans(draw: Any) -> Plan:
    sites = tuple(draw(site_plans(i)) for i in range(draw(st.integers(1, 4))))
    skipped = tuple(Skipped(*pair) for pair in draw(st.lists(st.tuples(NAMES, NAMES), max_size=3)))
    info = draw(st.dictionaries(NAMES, st.one_of(NAMES, st.integers(), st.floats(allow_nan=False), st.booleans())))
    return Plan(sites, skipped, draw(st.floats(1e-3, 1)), draw(st.floats(1, 1e15)), info)


@given(plans())
def test_a_loaded_plan_is_the_one_saved(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as directory:
        first, second = Path(directory, "first"), Path(directory, "second")
        plan.save(first)
        back = Plan.load(first)
        back.save(second)
        assert back.as_dict() == plan.as_dict()
        assert back.digest() == plan.digest()
        assert first.read_bytes() == second.read_bytes()
    for a, b in zip(plan.sites, back.sites, strict=True):
        assert a.site == b.site and a.live == b.live
        assert a.tensors.keys() == b.tensors.keys()
        assert all(
            torch.equal(a.tensors[k], b.tensors[k]) and a.tensors[k].dtype == b.tensors[k].dtype for k in a.tensors
        )
