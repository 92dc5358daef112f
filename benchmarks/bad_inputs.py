"""Bad input: each is refused with an error of ours that says what is wrong, and nothing is made of it."""

import json
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from outcome import Case, Outcome
from subjects import VOCABULARY, llama, plan_of_layers, tokens
from torch import Tensor, nn

import rana_compile
from rana_compile import Plan, PlanError, RanaError, documents
from rana_compile.checkpoint import Checkpoint
from rana_compile.config import BackendOptions
from rana_compile.passes.record import Recorder

Attempt = Callable[[], object]
BOUND = 1 << 16  # KiB that reading a hostile file may take


def refused(name: str, attempts: Mapping[str, Attempt] | Iterable[tuple[str, Attempt]], seen: str) -> Outcome:
    """A row: each attempt must end in an error of ours that holds the words."""
    tries, lost = 0, 0
    for words, attempt in attempts.items() if isinstance(attempts, Mapping) else attempts:
        tries += 1
        try:
            attempt()
        except RanaError as error:
            lost += words not in str(error)
            continue
        lost += 1
    return Outcome(name, tries, lost, seen)


def calibrated(model: nn.Module, batches: Any = None, **settings: Any) -> Attempt:
    given: dict[str, Any] = {"recipe": "neuron", "progress": False} | settings
    return lambda: rana_compile.calibrate(model, tokens(4) if batches is None else batches, **given)


def budgets(tries: int, directory: Path) -> Outcome:
    model, nan = llama(), float("nan")
    attempts = {
        f"{name} is {value!r}; expected": calibrated(model, **{name: value})
        for name in ("flops_budget", "bytes_budget", "max_loss_increase")
        for value in (0, -1, nan, "half", True)
    }
    for name, share in {"flops_budget": 0.01, "bytes_budget": 0.02}.items():
        attempts[f"{name} is 1.01; expected a share"] = calibrated(model, **{name: 1.01})
        attempts[f"a budget of {share:.1%} cannot be reached"] = calibrated(model, **{name: share})
    attempts["contradict each other"] = calibrated(model, flops_budget=0.5, bytes_budget=0.5)
    attempts["no plan within a loss increase of 1e-12"] = calibrated(model, max_loss_increase=1e-12)
    return refused("budgets: ≤ 0, > 1, NaN, out of reach", attempts, "refused; what can be reached is said")


def data(tries: int, directory: Path) -> Outcome:
    model, ids = llama(), torch.arange(8).view(1, 8)
    batches: dict[str, Any] = {
        "at least 2 batches": [],
        "batch 0 is empty": [ids[:, :0]] * 2,
        "thresholds need at least 32": [ids] * 3,
        "batch 1 holds no tensor in 'input_ids'": [ids, [[1, 2, 3], [4, 5]]],
        "and attention_mask of shape": [{"input_ids": ids, "attention_mask": torch.ones(1, 7)}] * 8,
        "torch.float32 tensor": [ids.float()] * 8,
        "torch.bool tensor": [ids.bool()] * 8,
        "torch.complex64 tensor": [ids.to(torch.complex64)] * 8,
        f"holds token id {VOCABULARY}": [torch.full((1, 8), VOCABULARY)] * 8,
        "holds token id -1": [torch.full((1, 8), -1)] * 8,
        "batches is a str": "text",
        "batches is a int": 7,
        "holds NaN in 'x'": [{"x": torch.tensor([[torch.nan]])}] * 2,
    }
    attempts = {words: calibrated(model, given) for words, given in batches.items()}
    seen = "refused before the model runs; the batch is named"
    return refused("data: empty, short, ragged, no integers, no such token", attempts, seen)


def numbers(tries: int, directory: Path) -> Outcome:
    """One weight of each matrix in turn is no number; activations and outputs that overflow."""
    attempts = []
    for value in (float("nan"), float("inf")):
        for name in [n for n, p in llama().named_parameters() if p.dim() > 1]:
            model = llama()
            with torch.no_grad():
                model.get_parameter(name)[1, 1] = value
            attempts.append((f"{name} holds NaN or infinity", calibrated(model)))
    for name, words in {"mlp.up_proj": "its input holds NaN", "lm_head": "the model's output holds NaN"}.items():
        model = llama()
        with torch.no_grad():
            next(m for n, m in model.named_modules() if n.endswith(name)).weight.fill_(1e38)
        attempts.append((words, calibrated(model)))
    return refused("NaN or infinity in weights, activations, outputs", attempts, "refused; weight or layer is named")


def foreign_plans(tries: int, directory: Path) -> Outcome:
    model = llama()
    plan = rana_compile.calibrate(model, tokens(4), 0.7, "neuron", progress=False)
    changed, wider = llama(), llama()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    wider.lm_head = nn.Linear(64, 256, bias=False)

    def newer() -> None:
        document = plan.as_dict() | {"format": 99}
        documents.save(directory / "newer", "rana_compile", document, {})
        Plan.load(directory / "newer")

    attempts: dict[str, Attempt] = {
        "this one has no parameter": lambda: plan.check(nn.Linear(4, 4)),
        "fitted on weights of shapes": lambda: plan.check(wider),
        "lm_head: the weights are not those": lambda: plan.check(changed),
        "now torch.bfloat16": lambda: plan.check(llama().bfloat16()),
        "this version reads": newer,
        "no plan at": lambda: Plan.load(directory / "none"),
        "the plan is a int": lambda: Plan.of(7),
    }
    return refused("plans of another model, dtype, weights or format", attempts, "refused; what differs is named")


def damaged_plans(tries: int, directory: Path) -> Outcome:
    """Bits flipped and ends cut off at random places of a plan's file."""
    plan, path, draw = plan_of_layers(0.5), directory / "plan", random.Random(0)
    plan.save(path)
    whole = path.read_bytes()
    lost = sum(not is_refused(path, broken, Plan.load) for broken in broken_copies(whole, 50 * tries, draw))
    path.write_bytes(whole)
    lost += Plan.load(path).digest() != plan.digest()
    return Outcome("a plan's file with a bit flipped, or cut off", 50 * tries, lost, "refused; the checksum sees it")


def broken_copies(whole: bytes, count: int, draw: random.Random) -> Iterable[bytes]:
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    for i in range(count):
        at = draw.randrange(head if i % 2 else len(whole))  # half of them in the header, which is short
        yield whole[:at] if i % 5 == 0 else whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]


def is_refused(path: Path, content: bytes, load: Callable[[Path], object]) -> bool:
    path.write_bytes(content)
    try:
        load(path)
    except PlanError:
        return True
    return False


def damaged_recordings(tries: int, directory: Path) -> Outcome:
    """The same of what a killed calibration had recorded: as good as none."""
    path, draw, generator = directory / "recording", random.Random(0), torch.Generator()
    kept: list[bytes] = []
    keep = Checkpoint.keep

    def keeping(self: Checkpoint, *args: Any, **kwargs: Any) -> None:
        keep(self, *args, **kwargs)
        kept[:] = [path.read_bytes()] if path.exists() else []

    Checkpoint.keep = keeping  # type: ignore[method-assign]
    try:
        calibrated(llama(), checkpoint=path)()
    finally:
        Checkpoint.keep = keep  # type: ignore[method-assign]
    checkpoint, lost = Checkpoint(path), 0
    fingerprint = json.loads(documents_text(kept[0]))["fingerprint"]
    for broken in broken_copies(kept[0], 20 * tries, draw):
        path.write_bytes(broken)
        recorder = Recorder(lambda: 4, 0)
        lost += checkpoint.restore(fingerprint, recorder, generator) != 0 or bool(recorder.samples)
    path.write_bytes(kept[0])
    lost += checkpoint.restore(fingerprint, Recorder(lambda: 4, 0), generator) == 0
    return Outcome("a recording with a bit flipped, or cut off", 20 * tries, lost, "not used, with a warning")


def documents_text(content: bytes) -> str:
    size = struct.unpack("<Q", content[:8])[0]
    return str(json.loads(content[8 : 8 + size])["__metadata__"]["rana_compile_recording"])


def hostile_files(tries: int, directory: Path) -> Outcome:
    """Sizes and nesting that would take the memory, and headers that contradict themselves."""
    path = directory / "plan"
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers: list[Any] = [
        {"a": tensor | {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": tensor | {"shape": [1 << 62, 1 << 62]}},
        {"a": tensor | {"shape": [-1]}},
        {"a": tensor | {"data_offsets": [4, 0]}},
        {"a": tensor, "b": tensor},
        {"a": tensor | {"dtype": "F7"}},
        *({"__metadata__": {"rana_compile": text}, "a": tensor} for text in hostile_texts()),
    ]
    files = [struct.pack("<Q", len(h)) + h + bytes(4) for h in (json.dumps(h).encode() for h in headers)]
    files += [struct.pack("<Q", size) + bytes(4) for size in (0, 1 << 24, 1 << 40, (1 << 64) - 1)]
    files += [b"", b"text", b"\xff" * 64, struct.pack("<Q", 100_000) + b"[" * 100_000]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lost = sum(not is_refused(path, content, Plan.load) for content in files)
    lost += resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > BOUND
    return Outcome("hostile plans: sizes, nesting, contradictions", len(files), lost, "refused within 64 MiB of memory")


def hostile_texts() -> list[str]:
    sites = {"format": 2, "checksum": "", "sites": [{"d_in": 10**30}], "skipped": [], "info": {}}
    documents = ("7", "[]", "{", "[" * 500_000, '{"a":' * 100_000, '{"format": 2, "format": 2}', '{"format": 1e999}')
    return [*documents, "1" * 100_000, '{"format": NaN}', json.dumps(sites)]


def options(tries: int, directory: Path) -> Outcome:
    given: dict[str, dict[str, Any]] = {
        "unknown option 'prefil'; known options": {"prefil": "dense"},
        "expected 'adapted' or 'dense'": {"prefill": "both"},
        "known modes": {"mode": "fastest"},
        "expected a dict": {"inductor": 3},
        "'calibration_tokens' is 0": {"calibration_tokens": 0},
        "'max_divergence' is 'low'": {"max_divergence": "low"},
        "is for calibration without a plan": {"plan": "p", "flops_budget": 0.5},
    }
    attempts: dict[str, Attempt] = {words: partial(BackendOptions.parse, each) for words, each in given.items()}
    attempts["unknown recipe 'best'; known recipes"] = calibrated(llama(), recipe="best")
    attempts["exclude='lm_heat' matches no parameter"] = calibrated(llama(), exclude=["lm_heat"])
    return refused("options that are unknown or contradict each other", attempts, "refused; the known ones are named")


def dtypes(tries: int, directory: Path) -> Outcome:
    """Stored weights of other dtypes stay dense, each with its reason; wide ones are adapted."""
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
    batches, lost = [{"x": torch.randn(64, 32)} for _ in range(4)], 0
    for dtype in kinds:
        plan = rana_compile.calibrate(Stored(dtype), batches, 0.7, "neuron", progress=False)
        lost += [s.site.name for s in plan.sites] != ["plain"] or not any(s.reason for s in plan.skipped)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        plan = rana_compile.calibrate(llama().to(dtype), tokens(4), 0.7, "neuron", progress=False)
        lost += plan.info["dtype"] != [str(dtype)] or not plan.adapted
    return Outcome("weights in float8, int8, float64, half", len(kinds) + 3, lost, "adapted, or dense with the reason")


class Stored(nn.Module):
    """A linear, and one whose weight is kept in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.weight = nn.Parameter(torch.randn(32, 32).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.plain(x), self.weight.to(x.dtype))


USE = """
import logging, torch
logging.basicConfig()
from rana_compile.kernels import ops
ops.load("cpu")
print(torch.ops.rana.linear(torch.ones(1, 8), torch.ones(6, 8), None).sum().item())
"""


def kernels(tries: int, directory: Path) -> Outcome:
    """No compiler, one that fails, and a cache that cannot be written: here with a stand-in that always fails."""
    failing = directory / "c++"
    failing.write_text("#!/bin/sh\necho 'No space left on device' >&2\nexit 1\n")
    failing.chmod(0o755)
    cases = [
        ({"PATH": "", "CXX": ""}, "no C++ compiler found", "48.0"),
        ({"CXX": str(failing), "RANA_COMPILE_CACHE": str(directory / "new")}, "RANA_COMPILE_CACHE chooses another", ""),
        ({"CXX": str(failing), "RANA_COMPILE_CACHE": "/proc/none"}, "cannot write '/proc/none/library'", ""),
    ]
    lost = 0
    for changes, words, printed in cases:
        environment = os.environ | changes
        done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=False)
        lost += words not in done.stderr or done.stdout.strip() != printed
    return Outcome("no compiler, a failing one, no cache", len(cases), lost, "plain PyTorch with a warning, or refused")


CASES: tuple[Case, ...] = (
    budgets,
    data,
    numbers,
    foreign_plans,
    damaged_plans,
    damaged_recordings,
    hostile_files,
    options,
    dtypes,
    kernels,
)
