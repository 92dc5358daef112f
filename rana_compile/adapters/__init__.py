"""Adapter families: what may replace a dense linear. To add one: a file here and a line in ``FAMILIES``."""

from rana_compile.adapters.base import Family, Tensors, adapter_flops
from rana_compile.adapters.gated import Gated
from rana_compile.adapters.low_rank import LowRank
from rana_compile.adapters.neuron import Neuron
from rana_compile.adapters.rank import Rank

_ALL: tuple[Family, ...] = (Neuron(), Gated(), Rank(), LowRank())
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

__all__ = ["FAMILIES", "Family", "Tensors", "adapter_flops"]
