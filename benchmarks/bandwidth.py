"""What this machine's memory gives: the limit that decode speeds are compared with."""

import statistics
import time

import torch


def measured_bandwidth(device: torch.device, rounds: int = 7) -> float:
    """Bytes per second: on CPU of a streaming read (all threads), on CUDA of a copy (read and write counted)."""
    if device.type == "cuda":
        source = torch.empty(2**31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        moved, work = 2 * source.numel(), lambda: target.copy_(source)
    else:
        source = torch.ones(2**26, dtype=torch.float32)  # 256 MiB, beyond any cache
        moved, work = source.numel() * 4, lambda: source.sum()
    times = []
    for _ in range(rounds):
        work()
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - begin)
    if device.type == "cuda":
        del source, target, work
        torch.cuda.empty_cache()
    return moved / statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
