"""Causal attention of a prompt on CPU → blocks of queries, each with the keys that it may see:

    …(q, k, v, is_causal=True)  →  cat(…(q[:128], k[:128], v[:128], mask), …(q[128:256], k[:256], v[:256], mask), …)

PyTorch's kernel takes 512 keys at a time and leaves such a step out only where all of it is forbidden. So up to 512
tokens compute the whole square, in 1.25 times the time of these blocks, which are five eighths of it.
"""

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention import SDPBackend

from rana_compile.kernels.ops import DTYPES
from rana_compile.passes.attend import SDPA, arguments, chosen_kernel, dtype_of, is_mapped, names_kernels
from rana_compile.passes.expand import Emitter

BLOCK = 128  # queries; 64 to 256 are as fast
LENGTHS = range(320, 705)  # shorter ones gain nothing, and of longer ones PyTorch leaves steps out
SLICE = 32  # queries that are one thread's work in a block


def split_causal_attention(gm: fx.GraphModule) -> int:
    """Replace calls in place, in a graph without gradients. Returns how many; recompiles if there is one."""
    if names_kernels(gm.graph):
        return 0
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is SDPA]
    found = [node for node in calls if dtype_of(node) in DTYPES and _is_split(node)]
    masks: dict[tuple[int, torch.dtype], fx.Node] = {}
    for node in found:
        given = arguments(node)
        key = given["query"].meta["example_value"].shape[-2], node.meta["example_value"].dtype
        if key not in masks:
            with gm.graph.inserting_before(found[0]):
                masks[key] = Emitter(gm.graph, found[0])(last_block, *key)
        rest = {name: value for name, value in given.items() if name in ("scale", "enable_gqa")}
        node.args, node.kwargs = (given["query"], given["key"], given["value"], masks[key]), rest
        node.target = attention_in_blocks
    if found:
        gm.recompile()
    return len(found)


def _is_split(node: fx.Node) -> bool:
    """Whether it is causal, of a length known to gain, and each block has work for all threads."""
    given = arguments(node)
    if given.get("is_causal") is not True or given.get("attn_mask") is not None or given.get("dropout_p"):
        return False
    query, key, value = (given[name].meta["example_value"] for name in ("query", "key", "value"))
    if query.device.type != "cpu" or query.dim() != 4 or not all(isinstance(size, int) for size in query.shape):
        return False
    batch, heads, n, _ = query.shape
    same = [t.dim() == 4 and statically_known_true(t.shape[i] == query.shape[i]) for t in (key, value) for i in (0, 2)]
    pieces = batch * heads * (BLOCK // SLICE)
    if n not in LENGTHS or not all(same) or pieces < 2 * torch.get_num_threads() or is_mapped(node):
        return False
    found, e = node.meta["example_value"], value.shape[-1]
    as_blocks = (n * heads * e, e, heads * e, 1)  # others may have been looked at through views
    return found.stride() == as_blocks and chosen_kernel(given) == SDPBackend.FLASH_ATTENTION


def last_block(n: int, dtype: torch.dtype) -> Tensor:
    """What the last block of n queries adds to its scores: [``BLOCK``, n rounded up to blocks], 0 and -inf.

    Of an earlier one it is a part. Of memory, so that Inductor computes it once and not for each call.
    """
    width = -(-n // BLOCK) * BLOCK
    mask = torch.full((BLOCK, width), -torch.inf, dtype=dtype, device="cpu").triu(width - BLOCK + 1)
    return mask.as_strided(mask.shape, mask.stride())


def attention_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, last: Tensor, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """``F.scaled_dot_product_attention(…, is_causal=True)`` of [batch, heads, n, e], with ``last_block(n, dtype)``.

    Lies in memory as PyTorch's. -inf is added to forbidden scores, which leaves those that are no numbers as they are.
    """
    n, blocks = query.shape[-2], []
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        shift = last.shape[1] - BLOCK - start
        mask = last[: end - start, shift : shift + end]
        seen = (key[..., :end, :], value[..., :end, :])
        block = SDPA(query[..., start:end, :], *seen, mask, scale=scale, enable_gqa=enable_gqa)
        blocks.append(block.transpose(1, 2))  # as it lies in memory
    return torch.cat(blocks, 1).transpose(1, 2)
