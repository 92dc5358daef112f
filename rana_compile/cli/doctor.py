"""``rana-compile doctor``: what is installed here, and whether each kernel computes what its plain form does."""

import argparse
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from rana_compile.cli.screen import Screen
from rana_compile.environment import environment
from rana_compile.kernels import cpu, ops, reference

D_IN, HIDDEN, D_OUT = 257, 129, 65  # odd, so that no kernel's tail goes untested
TOLERANCE = 1e-5  # relative, in float32: two products and sums of a few hundred terms


@dataclass(frozen=True)
class Check:
    """One thing that was tried. ``remedy``: what to do if it failed."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def run(settings: argparse.Namespace, screen: Screen) -> int:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = [_backend(), _compiler(), _cache()]
    for device in devices:
        with screen.stage(f"testing the kernels for {device} (built at the first use, half a minute)"):
            checks += _kernels(device)
    about = environment()
    document = {"environment": about, "checks": [asdict(check) for check in checks]}
    table = Table(title="rana-compile doctor", show_header=False)
    for name, value in about.items():
        table.add_row(name, value, "")
    table.add_section()
    for check in checks:
        table.add_row(check.name, check.found, "[green]ok[/]" if check.ok else f"[red]failed[/] {check.remedy}")
    screen.result(document, table)
    return 0 if all(check.ok for check in checks) else 1


def _backend() -> Check:
    found = "rana" in torch._dynamo.list_backends()
    remedy = "install the package: torch.compile finds it by its entry point"
    return Check("backend", found, "torch.compile finds it" if found else "torch.compile does not find it", remedy)


def _compiler() -> Check:
    path = cpu.find_compiler()
    if path is None:
        return Check("C++ compiler", False, "none", "install g++, or set CXX; without, plain PyTorch runs, and slower")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Check("C++ compiler", done.returncode == 0, (done.stdout or done.stderr).split("\n")[0], "install g++")


def _cache() -> Check:
    path = cpu.cache_directory()
    remedy = "set RANA_COMPILE_CACHE to a place that can be written, or kernels are built for every run"
    return Check("cache directory", path == cpu.wanted_directory(), str(path), remedy)


def _kernels(device: str) -> list[Check]:
    try:
        ops.load(device)
    except Exception as error:  # whatever it is, it is what the user asked to see
        return [Check(f"kernels, {device}", False, f"{type(error).__name__}: {error}", "see the message")]
    return [_kernel(name, device) for name in ops.NAMES]


def _kernel(name: str, device: str) -> Check:
    what = f"rana::{name}, {device}"
    arguments = _arguments(name)
    try:
        exact = getattr(reference, name)(*(a.double() if _is_wide(a) else a for a in arguments))
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        result = getattr(torch.ops.rana, name)(*moved).cpu().double()
    except Exception as error:
        return Check(what, False, f"{type(error).__name__}: {error}", "please report it, with this table")
    apart = float((result - exact).norm() / exact.norm())
    return Check(what, apart <= TOLERANCE, f"relative error {apart:.1e}", "please report it, with this table")


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _arguments(name: str) -> list[Any]:
    """One row, about half of the coordinates live, float32."""
    draw = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw) * sizes[0] ** -0.5

    x = torch.randn(1, D_IN, generator=draw)
    half_in, half_hidden = torch.full((D_IN,), 0.67), torch.full((HIDDEN,), 0.1)
    arguments: dict[str, list[Any]] = {
        "linear": [x, normal(D_OUT, D_IN), normal(D_OUT)],
        "masked_linear": [x, half_in, normal(D_IN, D_OUT), normal(D_OUT)],
        "rank_linear": [x, normal(HIDDEN, D_IN), half_hidden, normal(HIDDEN, D_OUT), normal(D_OUT)],
        "gated_mlp": [
            x, half_in, normal(D_IN, 2 * HIDDEN), normal(2 * HIDDEN), half_hidden, normal(HIDDEN, D_OUT),
            normal(D_OUT), "silu",
        ],
        "gated_up": [x, half_in, normal(D_IN, HIDDEN), half_hidden, normal(HIDDEN, D_IN), normal(2 * HIDDEN), "silu"],
    }  # fmt: skip
    return arguments[name]
