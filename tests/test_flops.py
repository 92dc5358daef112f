"""What we count is what PyTorch counts, on dense models of many architectures."""

from typing import Any

import pytest
import torch
from tiny_models import HEADS, HIDDEN, MODELS, build
from torch.utils.flop_counter import FlopCounterMode

from rana_compile import testing
from rana_compile.flops import attention_flops, dense_flops
from rana_compile.passes.find import find_sites

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}  # what linears become
EXPERTS = [name for name in MODELS if name.endswith("(experts)")]  # their grouped products are no linears
BATCH, LENGTH = 2, 9


def counted(model: Any, inputs: dict[str, Any]) -> dict[Any, int]:
    with FlopCounterMode(display=False) as counter:  # with gradients: without, torch.nn fuses layers and counts nothing
        model(**inputs)
    return counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in EXPERTS])
def test_linears_cost_what_torch_counts(name: str) -> None:
    model, inputs = build(name, layers=1)
    given = inputs(BATCH, LENGTH)
    matches = [m for gm in testing.graphs_of(model, **given) for m in find_sites(gm).matches]
    ours = sum(int(m.rows or 0) * dense_flops(m.site) for m in matches)
    assert ours == sum(n for op, n in counted(model, given).items() if op in PRODUCTS)


def test_attention_costs_what_torch_counts() -> None:
    model, inputs = build("Llama", layers=2)
    model.set_attn_implementation("eager")  # the fused kernel of CPUs is not counted
    counts = counted(model, inputs(BATCH, LENGTH))
    width = HIDDEN // HEADS
    angles = 2 * width // 2 * LENGTH  # rotary embedding: positions times frequencies, a product in some versions
    ours = BATCH * LENGTH * attention_flops(LENGTH, HEADS, width, layers=2)
    assert sum(n for op, n in counts.items() if op not in PRODUCTS) - ours in (0, angles)
