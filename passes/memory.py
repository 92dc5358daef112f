"""Values that Inductor computes once, into memory, where it would compute them anew for each kernel or reader."""

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from rana_compile.passes.expand import Emitter


def kept(node: fx.Node) -> fx.Node:
    """A new node, where the graph inserts: the value of ``node``, which ``can_be_kept``, in memory."""
    return Emitter(node.graph, node)(in_memory, node)


def in_memory(x: Tensor) -> Tensor:
    """x itself, as a view of memory."""
    return x.as_strided(x.shape, x.stride(), x.storage_offset())


def can_be_kept(node: fx.Node) -> bool:
    """Whether it is a plain tensor that fills memory of its own, in an order that does not follow from data.

    Inductor may lay others out otherwise, without gaps or what is before them, and reads the view where PyTorch has it.
    """
    if not is_plain(node):
        return False
    x = node.meta["example_value"]
    if free_unbacked_symbols((*x.shape, *x.stride(), x.storage_offset())):
        return False
    whole = x.storage_offset() == 0, x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return all(map(statically_known_true, whole)) and not any(statically_known_true(n == 0) for n in x.stride())


def is_plain(node: fx.Node) -> bool:
    """Whether it is a plain tensor."""
    return isinstance(node.meta.get("example_value"), FakeTensor)
