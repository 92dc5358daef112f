"""Long runs on a tiny model: decode steps, models compiled and discarded, threads and forks; what grew or went wrong.

    python benchmarks/endurance.py                                  # 20,000 steps, 200 models; status 1 if any is lost
    python benchmarks/endurance.py --only decode_steps --tries 50   # 50,000 steps

``CASES`` are cases of the table that ``reliability.py`` makes.
"""

import argparse
import copy
import gc
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from outcome import Case, Outcome
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan, testing
from rana_compile.binding import bound_sites

STEPS, CYCLES, CALLS = 1000, 10, 100  # of each try: decode steps, models discarded, calls of each thread
THREADS = 8
CONTEXT = 64  # decode steps before the cache starts again
VOCABULARY = 128
GROWTH = 16 << 20  # bytes of resident memory that allocators may take after the warm-up
# and for each compilation, of which Inductor keeps its modules and the classes of graphs; where stock torch.compile has
# to compile each model, after a reset, it keeps 1.7 MiB of this one
KEPT = 1 << 19


def tiny_model(seed: int = 0) -> Any:
    """A model with layers of every kind that is adapted, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (1, 32), generator=generator) for _ in range(count)]


def planned(model: nn.Module) -> Plan:
    return rana_compile.calibrate(model, batches(6), flops_budget=0.6, progress=False)


def compiled(model: Any, plan: Plan, compiler: str) -> Any:
    model.compile(backend="rana", options={"plan": plan, "compiler": compiler})
    return model


class Memory:
    """Resident memory of this process, from a moment on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        gc.collect()
        self.before = self._process.memory_info().rss

    def growth(self) -> int:
        """Bytes more than then."""
        gc.collect()
        return int(self._process.memory_info().rss - self.before)


def decode_steps(tries: int, directory: Path) -> Outcome:
    return decoding(tries * STEPS)


def decoding(steps: int, compiler: str = "inductor") -> Outcome:
    """The same text again and again from a cache that starts again: the same tokens, no more memory, no new graph."""
    from transformers import StaticCache

    model = tiny_model()
    model = compiled(model, planned(model), compiler)
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    positions = torch.arange(CONTEXT).split(1)

    def text(length: int) -> list[int]:
        cache.reset()
        ids, tokens = torch.zeros(1, 1, dtype=torch.long), []
        for position in positions[:length]:
            ids = model(input_ids=ids, past_key_values=cache, position_ids=position[None]).logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
        return tokens

    with torch.no_grad():
        first = [text(CONTEXT) for _ in range(4)][-1]  # warm
        memory = Memory()
        with testing.count_compilations() as counts:
            lengths = [min(CONTEXT, steps - done) for done in range(0, steps, CONTEXT)]
            wrong = sum(text(length) != first[:length] for length in lengths)
    grown = memory.growth()
    seen = f"{grown / 2**20:+.1f} MiB resident, {counts.graphs} graphs compiled, {wrong} of {len(lengths)} texts differ"
    return Outcome("decode steps of one compiled model", steps, wrong + counts.graphs + (grown > GROWTH), seen)


def discarded_models(tries: int, directory: Path) -> Outcome:
    return discarding(tries * CYCLES)


def discarding(cycles: int, compiler: str = "inductor") -> Outcome:
    """Copies of a model, each compiled with the plan, run and let go: nothing stays, nothing is traced again."""
    model = tiny_model()
    plan = planned(model)
    return _discarded(
        "models compiled with a plan, run and let go",
        cycles,
        lambda i: compiled(copy.deepcopy(model), plan, compiler),
        GROWTH + cycles * (KEPT if compiler == "inductor" else 0),
    )


def discarded_calibrations(tries: int, directory: Path) -> Outcome:
    return discarding_calibrated(tries)


def discarding_calibrated(cycles: int) -> Outcome:
    """Models of other weights that calibrate themselves: their plans go too."""
    options = {"calibration_tokens": 64, "max_divergence": 99.0, "compiler": "eager"}

    def made(i: int) -> Any:
        model = tiny_model(i)
        model.compile(backend="rana", options=options)
        return model

    return _discarded("models that calibrated themselves, run and let go", cycles, made)


def _discarded(name: str, cycles: int, made: Callable[[int], Any], growth: int = GROWTH) -> Outcome:
    alive: list[weakref.ref[Any]] = []
    warm = 2
    for i in range(warm):
        alive += _used(made(i))
    _collect()
    memory, tensors = Memory(), tensor_bytes()
    with testing.count_compilations() as counts:
        for i in range(warm, warm + cycles):
            alive += _used(made(i))
            _collect()
            alive = [ref for ref in alive if ref() is not None]
    grown, more = memory.growth(), tensor_bytes() - tensors
    seen = f"{len(alive)} objects and {more} bytes of tensors left, {counts.graphs} graphs traced again, "
    seen += f"{grown / 2**20:+.1f} MiB resident"
    return Outcome(name, cycles, len(alive) + counts.graphs + (more > 0) + (grown > growth), seen)


def tensor_bytes() -> int:
    """Of all tensors that Python knows; fake ones, which hold nothing, excepted."""
    tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


def _used(model: Any) -> list[weakref.ref[Any]]:
    """Weak references to a model, what it consists of, its plan where it fitted one, and all that was made for it."""
    with torch.no_grad():
        for ids in (*batches(4), batches(1)[0][:, :1]):
            model(input_ids=ids, use_cache=False)
    bound = bound_sites(list(model.parameters()))
    plan = {id(t) for site in bound for t in site.entry.tensors.values()}  # which outlives the model
    own = [t for site in bound for t in site.buffers if id(t) not in plan]
    return [weakref.ref(o) for o in (model, *model.parameters(), *bound, *own)]


def _collect() -> None:
    """Weights go first, then what was kept for as long as they live."""
    for _ in range(3):
        gc.collect()


def threads(tries: int, directory: Path) -> Outcome:
    return calling(tries * CALLS)


def calling(calls: int, compiler: str = "inductor") -> Outcome:
    """One model, warm, called by many threads. Cold, each would compile it, and Dynamo stops at eight graphs."""
    model = tiny_model()
    plan = planned(model)
    inputs = [ids[:, :length] for ids in batches(4) for length in (1, 7)]
    alone = compiled(copy.deepcopy(model), plan, compiler)
    with torch.no_grad():
        expected = [alone(input_ids=ids, use_cache=False).logits for ids in inputs]
    shared = compiled(model, plan, compiler)
    with torch.no_grad():
        for ids in inputs:
            shared(input_ids=ids, use_cache=False)

    def run(thread: int) -> int:
        wrong = 0
        with torch.no_grad():  # of this thread
            for i in range(thread, thread + calls):
                got = shared(input_ids=inputs[i % len(inputs)], use_cache=False).logits
                wrong += not torch.equal(got, expected[i % len(inputs)])
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = sum(pool.map(run, range(THREADS)))
    return Outcome(
        f"calls from {THREADS} threads at once", calls * THREADS, wrong, "the results of one thread, bit for bit"
    )


def forks(tries: int, directory: Path) -> Outcome:
    return forking(tries)


def forking(children: int, compiler: str = "inductor") -> Outcome:
    """Children forked after compiling run the model: with one thread, since those of OpenMP are not forked with it."""
    model = tiny_model()
    model = compiled(model, planned(model), compiler)
    ids = batches(1)[0][:, :1]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        wrong = sum(not _same_in_a_child(model, ids, expected) for _ in range(children))
    return Outcome("forks after compiling", children, wrong, "the child's results are its parent's, bit for bit")


def _same_in_a_child(model: Any, ids: Tensor, expected: Tensor, seconds: float = 60) -> bool:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            torch.set_num_threads(1)
            status = int(not torch.equal(model(input_ids=ids, use_cache=False).logits, expected))
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return False


CASES: tuple[Case, ...] = (decode_steps, discarded_models, discarded_calibrations, threads, forks)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run long, and see what grows or goes wrong.")
    parser.add_argument("--tries", type=int, default=20, help=f"of {STEPS} steps and {CYCLES} models each (20)")
    names = {case.__name__: case for case in CASES}  # type: ignore[attr-defined]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    settings = parser.parse_args()
    lost = 0
    for name in settings.only or names:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            outcome = names[name](settings.tries, Path(directory))
        seconds = time.perf_counter() - begin
        print(f"{outcome.name}: {outcome.tries}, lost {outcome.lost} ({outcome.seen}), {seconds:.0f} s", flush=True)
        lost += outcome.lost
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
