"""What a token costs: the one place that counts FLOPs (a multiply-add is 2) and bytes.

Per decoded token, over linear layers; attention scores are reported apart since they grow with the context.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rana_compile.types import Site

if TYPE_CHECKING:
    from torch import Tensor


def dense_flops(site: Site) -> int:
    """FLOPs of ``W x`` for one token."""
    return 2 * site.d_in * site.d_out


def masked_flops(d_basis: float, d_out: int) -> float:
    """FLOPs of a product that reads ``d_basis`` live coordinates on average."""
    return 2.0 * d_basis * d_out


def total_dense_flops(sites: Iterable[Site]) -> int:
    """FLOPs of all sites for one token."""
    return sum(dense_flops(s) for s in sites)


def attention_flops(context: int, heads: int, head_dim: int, layers: int) -> int:
    """FLOPs of attention scores and their weighted sum for one token at a context length (never adapted)."""
    return 4 * context * heads * head_dim * layers


def bytes_read(flops: float, itemsize: int, tensors: "Mapping[str, Tensor]") -> float:
    """Bytes that one decoded token reads: each multiply-add uses one weight element; thresholds and probes beside."""
    others = sum(4 * t.numel() for name, t in tensors.items() if name.endswith("threshold") or name == "probe")
    return flops / 2 * itemsize + others
