"""The state of a training run in one safetensors file, whole or not there: a killed run goes on from it."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from rana_compile.files import replacing

_KEY = "training_state"


def save(path: Path, model: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Write parameters, the optimiser's tensors and ``state`` (what JSON holds); the file before stays until then."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": t.contiguous() for key, t in entry.items() if isinstance(t, Tensor)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {_KEY: json.dumps(state)})


def load(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """Put back what ``save`` wrote, in place, and return its ``state``; an empty one if there is no file."""
    from safetensors import safe_open

    if not path.exists():
        return {}
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        state: dict[str, Any] = json.loads(file.metadata()[_KEY])
    parameters = dict(model.named_parameters())
    entries: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "model":
            parameters[rest].data.copy_(tensor)
        else:
            index, _, name = rest.partition(".")
            entries.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return state
