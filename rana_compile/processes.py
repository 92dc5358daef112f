"""Processes that calibrate one model together, each on its own data, and end with the same plan (torch.distributed)."""

import hashlib
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from rana_compile.types import ConfigError


class Processes:
    """What calibration needs of a process group; without one, this process alone.

    Collectives run on the CPU or, with a backend that has none there (NCCL), on the current device. All processes call
    them in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        if group is None:
            self.count, self.rank = 1, 0
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ConfigError("group is given, but torch.distributed is not initialised; call init_process_group first")
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)
        backend = str(dist.get_backend(group))
        accelerator = torch.accelerator.current_accelerator()
        self._device = accelerator if "nccl" in backend and accelerator is not None else torch.device("cpu")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, a new tensor on the same device."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        total = tensor.detach().to(self._device, copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(tensor.device)

    def total(self, *numbers: float) -> list[float]:
        """The sums over processes of some numbers."""
        return list(numbers) if self.count == 1 else self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which are of one shape and dtype, in the order of their ranks."""
        if self.count == 1:
            return [tensor]
        import torch.distributed as dist

        mine = tensor.detach().contiguous().to(self._device).view(-1).view(torch.uint8)  # any dtype: bytes
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine, group=self._group)
        return [part.view(tensor.dtype).view(tensor.shape).to(tensor.device) for part in parts]

    def own(self, path: str | PathLike[str]) -> str:
        """A file of this process."""
        return fspath(path) if self.count == 1 else f"{fspath(path)}.{self.rank}"

    def check_same(self, text: str, what: str) -> None:
        """Raises ConfigError, on all processes, unless the text is the same on each; ``what`` differs."""
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        differs = any(not torch.equal(other, digest) for other in self.gathered(digest))
        if self.total(float(differs))[0]:
            raise ConfigError(f"{what} (seen on rank {self.rank} of {self.count})")


ALONE = Processes()
