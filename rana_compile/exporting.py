"""An adapted model as a plain module, for what takes modules and no backend: ``torch.export``, and what follows it.

    F.linear(x, W, b), W a weight of the plan  →  the adapter's masked dense form

The adapters of ``model.compile(backend="rana")`` live in compiled graphs, which ``torch.export`` does not look at: it
traces the module, so it would export the dense one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rana_compile.adapters import FAMILIES
from rana_compile.plan import Plan, SitePlan


class Exportable(nn.Module):
    """Called like the model; every token computed with its masks, in plain PyTorch: right, and no faster.

    Attributes:
        model: the model itself; its parameters are this module's.
    """

    def __init__(self, model: nn.Module, plan: Plan | str | PathLike[str]) -> None:
        """Raises PlanError if the plan cannot be read or belongs to other weights."""
        super().__init__()
        chosen = Plan.of(plan)
        chosen.check(model)
        self.model = model
        self._sites = chosen.adapted
        self._empty: dict[str, torch.Size] = {}  # an archive of torch.export takes no tensor without elements
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for i, entry in enumerate(self._sites):
            weights = entry.site.oriented([parameters[name].detach() for name in entry.site.weights])
            stored = {k: t.to(weights[0].device) for k, t in entry.tensors.items()}
            for name, tensor in (stored | FAMILIES[entry.family].derive(weights, stored)).items():
                key = f"site_{i}_{name}"
                if tensor.numel():
                    self.register_buffer(key, tensor.contiguous())
                else:
                    self._empty[key] = tensor.shape
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.named_buffers(recurse=False))
        device = next(iter(parameters.values())).device
        buffers |= {key: torch.empty(shape, device=device) for key, shape in self._empty.items()}
        uses = {}
        for i, entry in enumerate(self._sites):
            prefix = f"site_{i}_"
            tensors = {k.removeprefix(prefix): t for k, t in buffers.items() if k.startswith(prefix)}
            for part, name in enumerate(entry.site.weights):
                uses[id(parameters[name])] = _Use(entry, part, tensors, parameters)
        with _Adapting(uses):
            return self.model(*args, **kwargs)


@dataclass(frozen=True)
class _Use:
    """One linear of an adapted site."""

    entry: SitePlan
    part: int
    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        site = self.entry.site
        weights = site.oriented([self.parameters[name] for name in site.weights])
        biases = [self.parameters.get(f"{name.removesuffix('weight')}bias") for name in site.weights]
        return FAMILIES[self.entry.family].forward(site, x, weights, biases, dict(self.tensors))[self.part]


class _Adapting(TorchFunctionMode):
    """Linears whose weight is the plan's are computed by its adapters."""

    def __init__(self, uses: Mapping[int, _Use]) -> None:
        super().__init__()
        self._uses = uses

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and (use := self._uses.get(id(args[1]))):
            return use(args[0])
        if func is torch.addmm and (use := self._uses.get(id(args[2]))):
            return use(args[1])
        return func(*args, **(kwargs or {}))
