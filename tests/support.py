"""Shared by the tests: tiny models, Dynamo graphs as a backend sees them, and graphs as short text."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rana_compile import testing
from rana_compile.adapters import FAMILIES, Tensors
from rana_compile.plan import Plan, SitePlan, weight_hash
from rana_compile.types import Site

VOCABULARY = 128


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


def graph_of(module: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """The one graph Dynamo hands to a backend."""
    (gm,) = testing.graphs_of(module, *inputs)
    return gm


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
