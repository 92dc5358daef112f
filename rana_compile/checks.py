"""What a model must be, and its data beside it, before hours are spent on them."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rana_compile.data import Batch
from rana_compile.types import ConfigError


def check_weights(parameters: Mapping[str, Tensor]) -> None:
    """Raises ConfigError for weights that are not all here, or are no numbers."""
    for name, p in parameters.items():
        if "torch.distributed.tensor" in sys.modules and isinstance(p, torch.distributed.tensor.DTensor):
            raise ConfigError(
                f"{name} is sharded over processes (a DTensor); calibrate before fully_shard or parallelize_module"
            )
        if p.is_meta or torch.nn.parameter.is_lazy(p):
            raise ConfigError(
                f"{name} has no values, and no hook of accelerate would load them: the model was never loaded; use "
                "from_pretrained, or load_state_dict(..., assign=True)"
            )
        if _is_broken(p.detach()):
            raise ConfigError(
                f"{name} holds NaN or infinity: the model's outputs mean nothing; load its weights again, or look at "
                "what made them"
            )


def _is_broken(weight: Tensor) -> bool:
    """One pass, no copy. Infinity is allowed in vectors: masks are sometimes parameters."""
    plain = weight.is_floating_point() and weight.dtype.itemsize > 1 and not is_traceable_wrapper_subclass(weight)
    if not plain or not weight.numel():
        return False
    least, most = map(float, weight.aminmax())
    return math.isnan(least) or (weight.dim() > 1 and not -math.inf < least <= most < math.inf)


def check_vocabulary(model: torch.nn.Module, data: Sequence[Batch]) -> None:
    """Raises ConfigError for token ids that the model has no embedding of."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    embeddings = getter() if getter else None
    size = getattr(embeddings, "num_embeddings", None)
    for i, batch in enumerate(data):
        ids = batch.get("input_ids")
        if size and ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            raise ConfigError(
                f"batch {i} holds token id {worst}; this model's vocabulary is 0 to {size - 1}: use its own tokenizer"
            )
