"""Shared by the tests: tiny models, Dynamo graphs as a backend sees them, and graphs as short text."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.torch_version import TorchVersion

from rana_compile import testing
from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.kernels.reference import ACTIVATIONS
from rana_compile.plan import Plan, SitePlan, weight_hash
from rana_compile.types import Site

VOCABULARY = 128
ROOT = Path(__file__).parents[1]
needs_sources = pytest.mark.skipif(
    not (ROOT / "rana_compile").exists(), reason="about the source tree; the package here is an installed one"
)


OLD_DYNAMO = TorchVersion(torch.__version__) < (2, 12)
OLD_TRANSFORMERS = TorchVersion(version("transformers")) < (5, 17)


def tiny_llama(layers: int = 2, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **(sizes | changes))
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)  # outputs that depend on every layer
    model.generation_config.eos_token_id = None
    return model


def tokens(batches: int, length: int = 32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (1, length), generator=generator) for _ in range(batches)]


class Attend(nn.Module):
    """Attention alone, with these options."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.given).relu()


def graph_of(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The one graph Dynamo hands to a backend."""
    return graph_and_inputs(module, *inputs)[0]


def graph_and_inputs(module: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph Dynamo hands to a backend, and what it would call it with."""
    (pair,) = testing._graphs(module, inputs, {})
    return pair


def formula(
    family: str,
    site: Site,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tensors: Tensors,
    margins: list[float] | None = None,
) -> Tensor:
    """What an adapter means, y = A (m * T x) + b [..., d_out], in float64; ``margins``: see ``masked``."""
    x, weights = x.double(), [w.double() for w in weights]
    shifts = [0.0 if b is None else b.double() for b in biases]
    bias = torch.cat([w.new_zeros(len(w)) + b for w, b in zip(weights, shifts, strict=True)])
    if family == "dense":
        return x @ torch.cat(weights).t() + bias
    probes = [tensors["probe"][i] if len(tensors.get("probe", ())) else None for i in range(len(weights))]
    if family == "neuron":
        parts = zip(tensors["threshold"], probes, weights, strict=True)
        return torch.cat([masked(x, t, x, p, margins) @ w.t() for t, p, w in parts], -1) + bias
    if family == "gated":
        gate = masked(x, tensors["threshold"][0], x, probes[0], margins) @ weights[0].t() + shifts[0]
        activated = ACTIVATIONS[str(site.activation)](gate)
        alive = masked(torch.ones_like(activated), tensors["gate_threshold"], x, probes[1], margins, activated)
        return torch.cat([gate, (x @ weights[1].t() + shifts[1]) * alive], -1)
    basis = tensors["output_basis"].double()
    z = x @ (basis.t() @ torch.cat(weights)).t()
    return (masked(z, tensors["threshold"], margins=margins) if "threshold" in tensors else z) @ basis.t() + bias


def masked(
    z: Tensor,
    threshold: Tensor,
    x: Tensor | None = None,
    probe: Tensor | None = None,
    margins: list[float] | None = None,
    judged: Tensor | None = None,
) -> Tensor:
    """z where abs(z)·s ≥ threshold (``judged``: of another value), s of the tokens x; distances go to ``margins``."""
    score = (z if judged is None else judged).abs()
    if x is not None and probe is not None:
        score = score * (x @ probe[:-1].double() + probe[-1].double()).clamp(-2, 2).exp()[..., None]
    if margins is not None:
        margins += [float((score - threshold.double()).abs()[..., threshold > 0].amin())] if threshold.any() else []
    return z * (score >= threshold.double())


def site_plan(site: Site, family: str, tensors: Tensors, weights: Sequence[Tensor]) -> SitePlan:
    masks = len(FAMILIES[family].mask_flops(site)) if family != "dense" else 0
    return SitePlan(
        site, family, tensors, live=(1.0,) * masks, flops_kept=0.5, error=0.0, weight_hash=weight_hash(weights)
    )


def plan_of(module: nn.Module, *entries: tuple[Site, str, Tensors]) -> Plan:
    """A plan written by hand for a module's current weights."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    sites = [site_plan(s, family, t, [parameters[name] for name in s.weights]) for s, family, t in entries]
    return Plan(tuple(sites), (), flops_asked=0.5, model_flops=1.0)


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a Markdown page, in order."""
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [(language, text) for language, text in found if language in languages]


def run_cli(*arguments: object) -> int:
    """The exit status of ``rana-compile`` with these arguments."""
    from rana_compile.cli import main

    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse's own way out
        return int(stop.code or 0)
