"""Causal attention of a prompt on CPU → blocks of queries, each with the keys that it may see:

    …(q, k, v, is_causal=True)  →  cat(…(q[:128], k[:128], v[:128], mask), …(q[128:256], k[:256], v[:256], mask), …)

PyTorch's kernel takes 512 keys at a time and leaves such a step out only where all of it is forbidden, so shorter
prompts compute the whole square: 512 tokens take 1.25 times as long as these blocks, which are five eighths of it.
"""

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend

from rana_compile.kernels.ops import DTYPES
from rana_compile.passes.attend import SDPA, arguments, chosen_kernel, dtype_of, is_mapped, names_kernels
from rana_compile.passes.expand import Emitter

BLOCK = 128  # queries; 64 to 256 are as fast
LENGTHS = range(320, 768)  # shorter ones gain nothing; from 768 on PyTorch leaves steps out
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
    query, key = (given[name].meta["example_value"] for name in ("query", "key"))
    batch, heads, n = query.shape[-4:-1] if query.dim() == 4 else (0, 0, 0)
    if query.device.type != "cpu" or not isinstance(n, int) or n not in LENGTHS or key.shape[-2] != n:
        return False
    if not isinstance(batch, int) or batch * heads * (BLOCK // SLICE) < 2 * torch.get_num_threads():
        return False
    return not is_mapped(node) and chosen_kernel(given) == SDPBackend.FLASH_ATTENTION


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
    """``F.scaled_dot_product_attention(…, is_causal=True)`` of [batch, heads, n, e], with ``last_block(n, dtype)``."""
    n, blocks = query.shape[-2], []
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        shift = last.shape[1] - BLOCK - start
        mask = last[: end - start, shift : shift + end]
        seen = (key[..., :end, :], value[..., :end, :])
        block = SDPA(query[..., start:end, :], *seen, mask, scale=scale, enable_gqa=enable_gqa)
        blocks.append(block.transpose(1, 2))  # as it lies in memory
    return torch.cat(blocks, 1).transpose(1, 2)
