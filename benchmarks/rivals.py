"""Rival methods as recipes: (evidence of all sites, MLPs, share of FLOPs to keep) → one candidate per site.

Thresholds of all of them are refitted with the adapters on, as ours are, so that every method is compared at the cost
it realises.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rana_compile.adapters import FAMILIES, adapter_flops
from rana_compile.adapters.neuron import neuron_tensors
from rana_compile.allocation import Option
from rana_compile.fitting import Candidate, Evidence, dense_candidate, gated_at, neuron_at, output_basis_of, quantiles
from rana_compile.flops import dense_flops
from rana_compile.recipes import Choice, Mlp, best_rank, neuron_recipe, solve
from rana_compile.types import ConfigError

STEP = 0.01  # of a block's FLOPs that TEAL's greedy search drops at a time


def wina(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """WINA: abs(x_j)·‖W[:,j]‖ in every linear, one ratio for all."""
    return {e.site: neuron_at(e, share, "column") for e in evidence}


def rank(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """RaNA's algorithm 1 at every site, one ratio for all."""
    return {e.site: best_rank(e, share) for e in evidence}


def uniform_loss(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """For the ablation: loss-aware scores, one ratio for all."""
    return {e.site: neuron_at(e, share, "loss") for e in evidence}


def uniform_token(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """For the ablation: the same, and every token its own threshold."""
    return {e.site: neuron_at(e, share, "token") for e in evidence}


def global_without_correction(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """For the ablation: our scores and allocation, prices as predicted."""
    candidates = neuron_recipe(evidence, mlps, share)
    return solve(candidates, share * sum(map(dense_flops, candidates)))


def cats(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """CATS: up and down where abs(act(gate)) is largest, one ratio for all MLPs, everything else dense."""
    by_site = {e.site: e for e in evidence}
    total = sum(map(dense_flops, by_site))
    masked = sum(dense_flops(m.inputs[0]) / 2 + dense_flops(m.down) for m in mlps)
    ratio = (share * total - (total - masked)) / masked if masked else 0.0
    if not 0.05 < ratio <= 1:
        raise ConfigError(f"CATS cannot keep {share:.0%}: attention and gates alone take {1 - masked / total:.0%}")
    choice = {e.site: dense_candidate(e) for e in evidence}
    for mlp in mlps:
        choice[mlp.inputs[0]] = gated_at(by_site[mlp.inputs[0]], by_site[mlp.down], ratio)
        live = ratio * mlp.down.d_in  # a hidden coordinate whose row was not computed is zero, and is not read
        option = Option(2.0 * live * mlp.down.d_out, 0.0)
        nearly_zero = by_site[mlp.down].x.new_full((1, mlp.down.d_in), torch.finfo(torch.float32).tiny)
        choice[mlp.down] = Candidate("neuron", neuron_tensors(nearly_zero), (live,), option)
    return choice


def svd(evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
    """Static low rank, whitened (SVD-LLM): every site keeps the rank that costs its share."""
    choice = {}
    for e in evidence:
        site = e.site
        basis = output_basis_of(e)[0]
        rank = max(1, min(basis.shape[1], int(share * site.d_in * site.d_out / (site.d_in + site.d_out))))
        tensors = {"output_basis": basis[:, :rank]}
        choice[site] = Candidate(
            "low_rank", tensors, (), Option(adapter_flops(FAMILIES["low_rank"], site, (), tensors), 0)
        )
    return choice


class Teal:
    """TEAL (arXiv 2408.14690): abs(x_j), densities inside a block found greedily by the error of the block's output.

    Each step lets the linear that harms the output least drop ``STEP`` more of the block's FLOPs; all blocks keep one
    ratio. The first token, whose outliers would drown all others in the error, does not count: that favours TEAL.

    Args:
        model: with its Transformer blocks in one ``nn.ModuleList``.
        ids: tokens [1, length] for which the blocks' outputs are compared.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self._model = model
        self._prefix, blocks = max(
            ((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)), key=lambda p: len(p[1])
        )
        self._paths: dict[str, list[dict[str, float]]] = {}
        self._calls: dict[str, tuple[Any, Any]] = {}
        hooks = [
            block.register_forward_pre_hook(self._keep(f"{self._prefix}.{i}"), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls[name] = (args, kwargs)

        return hook

    def __call__(self, evidence: Sequence[Evidence], mlps: Sequence[Mlp], share: float) -> Choice:
        blocks: dict[str, list[Evidence]] = defaultdict(list)
        choice = {e.site: dense_candidate(e) for e in evidence}
        for e in evidence:
            name = ".".join(e.site.weights[0].split(".")[: self._prefix.count(".") + 2])
            if name in self._calls:
                blocks[name].append(e)
        rest = sum(dense_flops(e.site) for e in evidence) - sum(dense_flops(e.site) for b in blocks.values() for e in b)
        inside = sum(dense_flops(e.site) for b in blocks.values() for e in b)
        wanted = (share * (rest + inside) - rest) / inside
        for name, members in blocks.items():
            density = self._densities(name, members, wanted)
            for e in members:
                choice[e.site] = _at_densities(e, [density[w] for w in e.site.weights])
        return choice

    def _densities(self, name: str, members: Sequence[Evidence], wanted: float) -> dict[str, float]:
        """Of the last two steps around the wanted share, the mixture that keeps it."""
        path = self._paths.get(name) or self._paths.setdefault(name, self._search(name, members))
        size = {w: n * e.site.d_in for e in members for w, n in zip(e.site.weights, e.site.d_outs, strict=True)}
        kept = [sum(step[w] * size[w] for w in size) / sum(size.values()) for step in path]
        after = next((i for i, share in enumerate(kept) if share <= wanted), len(path) - 1)
        if after == 0 or kept[after] > wanted:
            return path[after]
        part = (kept[after - 1] - wanted) / (kept[after - 1] - kept[after])
        return {w: (1 - part) * path[after - 1][w] + part * path[after][w] for w in size}

    def _search(self, name: str, members: Sequence[Evidence], least: float = 0.45) -> list[dict[str, float]]:
        block = self._model.get_submodule(name)
        modules = {w: self._model.get_submodule(w.rpartition(".")[0]) for e in members for w in e.site.weights}
        size = {w: n * e.site.d_in for e in members for w, n in zip(e.site.weights, e.site.d_outs, strict=True)}
        total = sum(size.values())
        ordered = {w: e.x.abs().flatten()[::7].sort().values for e in members for w in e.site.weights}

        def error(density: Mapping[str, float]) -> float:
            thresholds = {w: float(v[round((1 - density[w]) * (len(v) - 1))]) for w, v in ordered.items()}
            return float((self._output(block, name, modules, thresholds) - exact).square().sum())

        exact = self._output(block, name, modules, dict.fromkeys(size, 0.0))
        path = [dict.fromkeys(size, 1.0)]
        while sum(path[-1][w] * size[w] for w in size) > least * total:
            trials = [path[-1] | {w: path[-1][w] - STEP * total / size[w]} for w in size]
            path.append(min((t for t in trials if min(t.values()) > 0), key=error))
        return path

    def _output(
        self, block: nn.Module, name: str, modules: Mapping[str, nn.Module], thresholds: Mapping[str, float]
    ) -> Tensor:
        def masked(threshold: float) -> Callable[..., Any]:
            return lambda module, args: (args[0] * (args[0].abs() >= threshold), *args[1:])

        hooks = [m.register_forward_pre_hook(masked(thresholds[w])) for w, m in modules.items() if thresholds[w]]
        args, kwargs = self._calls[name]
        with torch.no_grad():
            output = block(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return (output[0] if isinstance(output, tuple) else output)[:, 1:]


def _at_densities(e: Evidence, densities: Sequence[float]) -> Candidate:
    """abs(x_j) against one threshold for each linear."""
    levels = quantiles(e.x.abs(), tuple(densities))
    each = zip(levels, densities, strict=True)
    threshold = torch.stack([(level if d < 1 else level * 0).expand(e.site.d_in) for level, d in each])
    live, tensors = tuple(min(d, 1.0) * e.site.d_in for d in densities), neuron_tensors(threshold)
    return Candidate("neuron", tensors, live, Option(adapter_flops(FAMILIES["neuron"], e.site, live, tensors), 0.0))
