"""Attention masks of truths that several calls share → numbers, once:

    …(q, k, v, mask)  →  …(q, k, v, numbers), numbers = where(mask, 0, -inf)

PyTorch makes them of its own accord, but in each call: 1.3 of 13.7 ms of a small model on a GPU, four prompts of 2,048
tokens.
"""

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend

from rana_compile.passes.attend import SDPA, arguments, chosen_kernel, dtype_of, is_mapped
from rana_compile.passes.expand import Emitter
from rana_compile.passes.match import is_written, written_memory

ALIGNED = 8  # elements, of masks that attention on CUDA takes as they are


def share_masks(gm: fx.GraphModule) -> int:
    """Masks of truths that several calls share → numbers, in place, in a graph without gradients. Returns how many.

    Recompiles if there is one.
    """
    calls: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is SDPA and (dtype := dtype_of(node)) is not None:
            mask = arguments(node).get("attn_mask")
            if isinstance(mask, fx.Node) and _are_truths(mask.meta["example_value"]) and not is_mapped(node):
                calls.setdefault((mask, dtype), []).append(node)
    found = 0
    shared = {key: users for key, users in calls.items() if len(users) > 1}
    written = written_memory(gm.graph) if shared else set()
    for (mask, dtype), users in shared.items():
        if is_written([mask], written):
            continue
        with gm.graph.inserting_before(users[0]):
            numbers = Emitter(gm.graph, users[0])(as_numbers, mask, dtype)
        changed = {node: arguments(node) | {"attn_mask": numbers} for node in users}
        kernels = [(chosen_kernel(arguments(node)), chosen_kernel(new)) for node, new in changed.items()]
        if all(before == after != SDPBackend.ERROR for before, after in kernels):
            for node, new in changed.items():
                node.args, node.kwargs = (), new
            found += 1
        else:
            gm.graph.erase_node(numbers)
    if found:
        gm.recompile()
    return found


def _are_truths(mask: Tensor) -> bool:
    """Whether it is a plain tensor of them."""
    return mask.dtype == torch.bool and isinstance(mask, FakeTensor)


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores: 0, or -inf where the mask is false.

    Rows are a multiple of ``ALIGNED`` apart: others would be copied for each call.
    """
    n = mask.shape[-1]
    wide = mask.new_zeros((*mask.shape[:-1], (n + ALIGNED - 1) // ALIGNED * ALIGNED), dtype=dtype)
    wide[..., :n].masked_fill_(~mask, -torch.inf)
    return wide.as_strided(mask.shape, wide.stride())  # of memory, so that Inductor does not compute it for each call
