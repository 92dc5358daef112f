"""Shapes of models that are timed without their weights."""

from typing import NamedTuple


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv(self) -> int:
        """Outputs of a key or a value projection."""
        return self.hidden // self.heads * self.kv_heads


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151936),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
}
