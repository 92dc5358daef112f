"""Models whose weights are not all on one device: accelerate's ``device_map`` with CPU, disk or several devices.

    module.forward = hooks(load → forward → free)     →     module.forward, weights that take no memory

The graph is traced with stand-ins (a weight's shape and dtype, one element of memory) and run with the weights
themselves, each loaded where it is used and free again after it; the backward pass loads them once more. So one weight
at a time is in memory, whatever the device map says, and all is computed on one device.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rana_compile.interrupts import to_the_end
from rana_compile.types import Site


class _Place(NamedTuple):
    """A tensor that is not where the model computes: whose it is, its names, and how it comes here."""

    owner: nn.Module
    attribute: str
    name: str
    load: Callable[[], Tensor]


class Weights(Mapping[str, Tensor]):
    """A model's parameters by name, those that are elsewhere loaded each time they are read.

    Attributes:
        device: where the model computes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = _main_device(model)
        self._model = model
        self._known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {place.name: place for place in _elsewhere(model, self.device, nn.Module.named_parameters)}
        self._stand_ins: dict[int, tuple[Tensor, str]] = {}  # by identity: (the stand-in, its name)
        self._loaded: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # by the address of their memory

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._parameters:
            return self._known[name]
        value = self._parameters[name].load().detach()
        self._loaded[value.untyped_storage().data_ptr()] = weakref.ref(value), name
        return value

    @property
    def has_all(self) -> bool:
        """Whether all parameters are where the model computes."""
        return not self._parameters

    def placed(self, name: str) -> Tensor:
        """The parameter as the model holds it, its dtype and shape at least; nothing is loaded."""
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    @contextmanager
    def stand_ins(self) -> Iterator[None]:
        """Meanwhile the model is free of hooks, and parameters that are elsewhere are stand-ins."""
        if not self._parameters:
            yield
            return
        forwards = {m: m.__dict__["forward"] for m in self._model.modules() if _is_wrapped(m)}
        buffers = _elsewhere(self._model, self.device, nn.Module.named_buffers)
        own: list[tuple[Any, str]] = [(p.owner._parameters, p.attribute) for p in self._parameters.values()]
        own += [(place.owner._buffers, place.attribute) for place in buffers]
        before = [(tensors, name, tensors[name]) for tensors, name in own]

        def restore() -> None:
            self._stand_ins.clear()
            for tensors, name, tensor in before:
                tensors[name] = tensor
            for module, forward in forwards.items():
                module.__dict__["forward"] = forward

        try:
            for module in forwards:
                _unwrap(module)
            for place in self._parameters.values():
                self._stand_in(place)
            for place in buffers:
                place.owner._buffers[place.attribute] = place.load()
            yield
        finally:
            to_the_end(restore)

    def _stand_in(self, place: _Place) -> None:
        """Full of NaN, so that one which is read itself is noticed; one for a module that has several names."""
        p = self._known[place.name]
        if id(place.owner._parameters[place.attribute]) in self._stand_ins:
            return
        one = torch.full((), math.nan if p.dtype.is_floating_point else 0, dtype=p.dtype, device=self.device)
        place.owner._parameters[place.attribute] = stand_in = nn.Parameter(one.expand(p.shape), requires_grad=False)
        self._stand_ins[id(stand_in)] = stand_in, place.name

    def resolved(self, value: Any) -> Any:
        """The weight that a stand-in stands for; anything else as it is."""
        _, name = self._stand_ins.get(id(value), (None, ""))
        return self[name] if name else value

    def loaded_again(self) -> AbstractContextManager[Any]:
        """Meanwhile autograd keeps names of loaded weights, not the weights, and loads them for the backward pass."""
        if not self._parameters:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, saved: Tensor) -> Any:
        reference, name = self._loaded.get(saved.untyped_storage().data_ptr(), (lambda: None, ""))
        return saved if reference() is None else (name, saved.shape, saved.stride(), saved.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, *view = packed
        return self[name].as_strided(*view)


class SiteWeights(Sequence[Tensor]):
    """A site's weights [d_out_i, d_in], read one at a time."""

    def __init__(self, weights: Weights, site: Site) -> None:
        self._weights, self._site = weights, site
        self.device = weights.device

    def __len__(self) -> int:
        return len(self._site.weights)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._site.oriented([self._weights[self._site.weights[index]].detach()])[0]


def _hooks(module: nn.Module) -> list[Any]:
    """Those that accelerate put on the module (``AlignDevicesHook``, or several in a ``SequentialHook``)."""
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", (hook,)) if hasattr(h, "execution_device")]


def _main_device(model: nn.Module) -> torch.device:
    """Where the first hook computes, else where the first parameter is."""
    places = (hook.execution_device for module in model.modules() for hook in _hooks(module))
    place = next((place for place in places if place is not None), None)
    if place is not None:
        return torch.empty(0, device=place).device
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _elsewhere(model: nn.Module, device: torch.device, named: Callable[..., Any]) -> list[_Place]:
    """Parameters or buffers (``named``) on other devices that a hook brings here."""
    places = []
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in _hooks(module):
            for name, tensor in named(module, recurse=hook.place_submodules, remove_duplicate=False):
                if tensor.device == device or (tensor.is_meta and hook.weights_map is None):
                    continue
                inner, _, attribute = name.rpartition(".")
                owner = module.get_submodule(inner)
                places.append(_Place(owner, attribute, f"{path}.{name}".lstrip("."), _load(hook, name, tensor, device)))
    return places


def _load(hook: Any, name: str, placed: Tensor, device: torch.device) -> Callable[[], Tensor]:
    if not placed.is_meta:
        return lambda: placed.detach().to(device)
    return lambda: hook.weights_map[name].to(device, placed.dtype)


def _is_wrapped(module: nn.Module) -> bool:
    return "_old_forward" in module.__dict__ and "forward" in module.__dict__


def _unwrap(module: nn.Module) -> None:
    original = module.__dict__["_old_forward"]
    if getattr(original, "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = original
