"""One line on the architectures people use: sites, graphs, recompilations and numbers, on tiny random models."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import OLD_DYNAMO, OLD_TRANSFORMERS
from tiny_models import MODELS, build
from torch import Tensor, fx, nn

import rana_compile
from rana_compile import Plan
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.objective import main_output
from rana_compile.passes.expand import expand
from rana_compile.passes.find import find_sites
from rana_compile.testing import Compilations, count_compilations

GATED = {"mlp.{gate,up}_proj": "gate_up", "mlp.down_proj": "down"}
SPLIT = {"self_attn.{q,k,v}_proj": "stacked", "self_attn.o_proj": "linear"}
OPT_LIKE = {"self_attn.{q,k,v}_proj": "stacked", "self_attn.out_proj": "linear", "fc1": "up", "fc2": "down"}
BERT = {
    "attention.self.{query,key,value}": "stacked",
    "attention.output.dense": "linear",
    "intermediate.dense": "up",
    "output.dense": "down",
}
WIDE_MLP = {"mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down"}


def layered(prefix: str, layer: Mapping[str, str], **rest: str) -> dict[str, str]:
    """Sites of the one layer and of what is around it (dots written as two underscores)."""
    sites = {f"{prefix}.0.{name}": kind for name, kind in layer.items()}
    return sites | {name.replace("__", "."): kind for name, kind in rest.items()}


LLAMA = layered("model.layers", SPLIT | GATED, lm_head="linear")
EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(["Llama", "Mistral", "Qwen 2", "Qwen 3", "Gemma", "Gemma 2", "Gemma 3"], LLAMA),
    "Phi-3": layered(
        "model.layers",
        dict.fromkeys(
            ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
            "linear",
        ),
        lm_head="linear",
    ),
    "GPT-NeoX (Pythia)": layered(
        "gpt_neox.layers",
        {"attention.query_key_value": "linear", "attention.dense": "linear"} | WIDE_MLP,
        lm_head="linear",
    ),
    "GPT-2": layered(
        "transformer.h",
        dict.fromkeys(["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "linear"),
        lm_head="linear",
    ),
    "OPT": layered("model.decoder.layers", OPT_LIKE, lm_head="linear"),
    "Falcon": layered(
        "transformer.h",
        {"self_attention.query_key_value": "linear", "self_attention.dense": "linear"} | WIDE_MLP,
        lm_head="linear",
    ),
    "Mixtral (experts)": layered("model.layers", SPLIT | {"mlp.gate": "linear"}, lm_head="linear"),
    "Qwen 2 MoE (experts)": layered(
        "model.layers",
        SPLIT
        | {f"mlp.shared_expert.{name.removeprefix('mlp.')}": kind for name, kind in GATED.items()}
        | {"mlp.gate": "linear", "mlp.shared_expert_gate": "linear"},
        lm_head="linear",
    ),
    "BERT": layered(
        "bert.encoder.layer", BERT, cls__predictions__transform__dense="linear", cls__predictions__decoder="linear"
    ),
    "MiniLM (sentence encoder)": layered("encoder.layer", BERT, pooler__dense="linear"),
    "ViT": layered(
        "vit.layers",
        {
            "attention.{q,k,v}_proj": "stacked",
            "attention.o_proj": "linear",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
        },
        classifier="linear",
    ),
    "Whisper": layered("model.encoder.layers", OPT_LIKE)
    | layered(
        "model.decoder.layers",
        OPT_LIKE
        | {"encoder_attn.q_proj": "linear", "encoder_attn.{k,v}_proj": "stacked", "encoder_attn.out_proj": "linear"},
        proj_out="linear",
    ),
    "nn.TransformerEncoder": layered(
        "encoder.layers",
        {"self_attn": "linear", "self_attn.out_proj": "linear", "linear1": "up", "linear2": "down"},
        head="linear",
    ),
    "timm-style fused qkv": layered(
        "blocks", {"attn.qkv": "linear", "attn.proj": "linear", "mlp.0": "up", "mlp.3": "down"}, head="linear"
    ),
}
NOT_ADAPTED = {  # weights that are reported instead, as (end of the name, reason)
    "Mixtral (experts)": ("mlp.experts.down_proj", "read by grouped_mm_fallback; only linears are adapted"),
    "Qwen 2 MoE (experts)": ("mlp.experts.down_proj", "read by grouped_mm_fallback; only linears are adapted"),
    "ViT": ("patch_embeddings.projection.weight", "read by conv2d; only linears are adapted"),
    "Whisper": ("encoder.conv1.weight", "read by conv1d; only linears are adapted"),
}


OTHERWISE = {  # in transformers before 5.17: modules of other names, or graphs that Dynamo breaks or cannot trace
    "GPT-NeoX (Pythia)",
    "Mixtral (experts)",
    "Qwen 2 MoE (experts)",
    "ViT",
    "Whisper",
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_sites_graphs_recompilations_and_numbers(name: str) -> None:
    """One pass per architecture: tracing it is what takes the time."""
    if OLD_TRANSFORMERS and name in OTHERWISE:
        pytest.skip("this version of transformers writes the model otherwise")
    model, inputs = build(name, layers=1)
    graphs: list[fx.GraphModule] = []

    def stock(gm: fx.GraphModule, example_inputs: object) -> fx.GraphModule:
        graphs.append(expand(gm))
        return gm

    expected, dense = run_thrice(model, inputs, backend=stock)
    if expected.breaks and OLD_DYNAMO:
        pytest.skip(f"Dynamo of torch {torch.__version__} breaks this model's graph, whatever the backend")
    assert expected.breaks == 0
    found = find_sites(graphs[0])
    assert {m.site.name: m.site.kind for m in found.matches} == EXPECTED[name]
    skipped = [(s.name, s.reason) for s in found.skipped]
    end, reason = NOT_ADAPTED.get(name, ("", ""))
    assert [r for n, r in skipped if n.endswith(end)] == ([reason] if end else [])
    assert bool(skipped) == bool(end)

    calibration = [inputs(2, 9) | varied(inputs, i) for i in range(4)]
    plan = rana_compile.calibrate(model, calibration, flops_budget=0.6, recipe="neuron", progress=False)
    assert {s.site.name for s in plan.sites} == set(EXPECTED[name])
    counts, outputs = run_thrice(model, inputs, backend="rana", options={"plan": plan, "compiler": "eager"})
    assert (counts.graphs, counts.breaks) == (expected.graphs, 0)
    for adapted, exact in zip(outputs, dense, strict=True):
        assert adapted.isfinite().all()
        assert (adapted - exact).abs().max() > 1e-3  # the masks do something

    whole = torch.compile(model, backend="rana", options={"plan": everything(plan), "compiler": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(main_output(whole(**inputs(2, 9))), dense[0], rtol=1e-4, atol=1e-4)


def varied(inputs: Any, seed: int) -> dict[str, Any]:
    """The same inputs, moved."""
    return {k: v.roll(seed, -1) for k, v in inputs(2, 9).items()}


def everything(plan: Plan) -> Plan:
    """The plan with every site adapted and every coordinate kept: budget 1.0."""
    sites = [
        replace(s, family="neuron", tensors=neuron_tensors(torch.zeros(len(s.site.weights), s.site.d_in)))
        for s in plan.sites
    ]
    return Plan(tuple(sites), plan.skipped, 1.0, plan.model_flops, plan.info)


def run_thrice(model: nn.Module, inputs: Any, **settings: Any) -> tuple[Compilations, list[Tensor]]:
    """Two lengths of two sequences, then one token of one."""
    torch._dynamo.reset()
    fast = torch.compile(model, **settings)
    with count_compilations() as counts, torch.no_grad():
        outputs = [main_output(fast(**inputs(*size))) for size in ((2, 9), (2, 12), (1, 1))]
    return counts, outputs


def test_every_model_has_an_expectation() -> None:
    assert set(EXPECTED) == set(MODELS)


def test_the_table_in_the_docs_has_every_model() -> None:
    """Written by examples/architectures.py, which takes too long for a test."""
    page = (Path(__file__).parents[1] / "docs/architectures.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(MODELS)
    assert {row[-1].removesuffix(" |") for row in rows} == {"equal", "–"}
