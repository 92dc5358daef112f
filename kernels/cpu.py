"""Build the C++ kernels once per machine and load them; whether they pay for several rows is measured once per shape.

The library lies in a cache directory under a name that hashes everything it depends on (source, PyTorch,
compiler, processor flags); it is compiled to a temporary name and renamed, so that processes may race and the next
build clears up after a killed one. Without a compiler the plain reference is registered, with a warning.

``$RANA_COMPILE_CXXFLAGS`` adds compiler flags behind ours, such as the sanitizers' of ``.ci/sanitize``.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rana_compile.files import check_writable, replacing
from rana_compile.kernels import reference
from rana_compile.kernels.measured import Measured, kept
from rana_compile.kernels.ops import LIBRARY, NAMES
from rana_compile.types import RanaError, WriteError

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = tuple(SOURCE.with_name(name) for name in ("cpu_products.h", "cpu_tiles.h", "cpu_vector.h"))
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-std=c++20")
ROOM = 1 << 21  # bytes that the library may take
FEW_ROWS = 16  # of an input, up to which each number is measured by itself; more as the next power of two
MOST_ROWS = 512  # beyond, as with so many: kernels take 256 at a time (kTogether), the library gets no better
ANY_ROWS = (8, 64, MOST_ROWS)  # that are measured where their number varies
LITTLE = 1.03  # of the library's time, that may be lost for some numbers of rows where more is won for others
SMALL = 2**16  # bytes of a weight below which calls, not bytes, are what costs
BEYOND_CACHES = 2**27  # bytes of weights that take turns


def register() -> None:
    """Load the C++ kernels, or, without a compiler, the plain forms."""
    compiler = find_compiler()
    if compiler is None:
        log.warning(
            "no C++ compiler found (looked for $CXX, g++, clang++): adapted layers run in plain PyTorch, which is "
            "slower than the dense model. Install g++ and run again"
        )
        for name in NAMES:
            LIBRARY.impl(name, getattr(reference, name), "CPU")
        return
    name = f"cpu_{_fingerprint(compiler)}.so"
    ready = wanted_directory() / name  # a read-only one will do
    if os.path.exists(ready):  # not Path.exists, which raises where a directory may not be searched
        try:
            return torch.ops.load_library(ready)
        except OSError as error:
            log.warning("%s cannot be loaded (%s): building it anew", ready, error)
    torch.ops.load_library(build(compiler, cache_directory() / name))


def linear_is_faster(rows: int | None, d: int, d_out: int, dtype: torch.dtype) -> bool:
    """Whether the dense kernel beats the library's product."""
    return _is_faster("linear", rows, d, d_out, 1.0, dtype)


def masked_is_faster(
    rows: int | None,
    d: int,
    d_out: int,
    density: float,
    dtype: torch.dtype,
    device: torch.device,
    gated: bool,
    before: int | None = None,
) -> bool:
    """Whether the masked kernel, with this share of the coordinates live in some row, beats the library's product.

    ``before``: and the dense kernel, of a weight [d, before].
    """
    faster = _is_faster("masked_linear", rows, d, d_out, density, dtype)
    return faster and (before is None or linear_is_faster(rows, before, d, dtype))


def gated_is_faster(rows: int | None, d: int, h: int, density: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether both products beat the library's: the gate's masked one, and the other dense.

    ``gated_up`` takes the latter where rows together keep nearly all.
    """
    return masked_is_faster(rows, d, h, density, dtype, device, False) and linear_is_faster(rows, d, h, dtype)


def stack_form(*_: Any) -> str:
    """How the parts of a stack are computed fastest: multiply-adds cost here, and starting a kernel does not."""
    return "apart"


def _is_faster(op: str, rows: int | None, d: int, d_out: int, density: float, dtype: torch.dtype) -> bool:
    compiler = find_compiler()
    if rows == 1 or d * d_out * dtype.itemsize < SMALL or compiler is None:
        return rows == 1  # one row is faster at every shape measured, and its results do not depend on a measurement

    def share(n: int) -> float:
        """Of the library's time."""
        n = n if n <= FEW_ROWS else min(1 << (n - 1).bit_length(), MOST_ROWS)
        found = _measured(op, n, d, d_out, dtype, torch.get_num_threads(), compiler)
        return found.masked(density) / found.dense

    if rows is not None:
        return share(rows) < 1
    product = 1.0
    for n in ANY_ROWS:  # what loses with few rows is not measured with many, which takes longer
        product *= (found := share(n))
        if found >= LITTLE:
            return False
    return product < 1


@cache
def _measured(op: str, rows: int, d: int, d_out: int, dtype: torch.dtype, threads: int, compiler: str) -> Measured:
    of = repr((_fingerprint(compiler), op, rows, d, d_out, dtype, threads))
    file = wanted_directory() / f"{op}_{hashlib.sha256(of.encode()).hexdigest()[:16]}.json"
    return kept(file, lambda: _measure(op, rows, d, d_out, dtype))


def _measure(op: str, rows: int, d: int, d_out: int, dtype: torch.dtype) -> Measured:
    """In turns, on weights that take turns too, so that hardly a cache holds them; of a wide weight on a part."""
    log.info("measuring %s for %d rows, %d×%d, %s", op, rows, d, d_out, dtype)
    cols = min(d_out, BEYOND_CACHES // (d * dtype.itemsize))
    own: dict[str, Any] = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
    first = torch.randn(d, cols, **own).to(dtype)
    copies = min(64, -(-BEYOND_CACHES // (d * cols * dtype.itemsize)), max(2, 1024 // rows))
    count = max(copies, min(8, 1024 // rows))
    weights = [first, *(first.clone() for _ in range(copies - 1))]
    z = torch.randn(rows, d, **own).to(dtype)
    every = torch.zeros(d, dtype=torch.float32, device="cpu")  # thresholds for every input
    half = every.masked_fill(torch.rand(d, **own) < 0.5, torch.inf)

    def masked(threshold: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda weight: torch.ops.rana.masked_linear(z, threshold, weight, None)

    ours = [lambda weight: torch.ops.rana.linear(z, weight.view(cols, d), None)]
    if op == "masked_linear":
        ours = [masked(half), masked(every)]
    calls = [*ours, lambda weight: F.linear(z, weight.view(cols, d))]
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for _ in range(6):
            for call, each in zip(calls, times, strict=True):
                begin = time.perf_counter()
                for i in range(count):
                    call(weights[i % copies])
                each.append((time.perf_counter() - begin) * 1e6 / count * d_out / cols)
    *found, dense = (statistics.median(each[1:]) for each in times)
    return Measured((), found[0], found[-1], dense)


def find_compiler() -> str | None:
    """The C++ compiler to use: $CXX, else g++, else clang++."""
    return next(
        (path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None
    )


def wanted_directory() -> Path:
    """$RANA_COMPILE_CACHE, else the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RANA_COMPILE_CACHE") or Path(home) / "rana_compile")


def cache_directory() -> Path:
    """``wanted_directory``, or a temporary one, with a warning, if that is read-only or its disk full.

    Raises WriteError if there is no place at all.
    """
    return _usable(wanted_directory())


@cache
def _usable(path: Path) -> Path:
    try:
        check_writable(path / "library", ROOM)
        return path
    except WriteError as error:
        try:
            fallback = Path(tempfile.mkdtemp(prefix="rana_compile_"))
        except OSError as second:
            raise WriteError(f"{error}; temporary files cannot be written either ({second})") from error
        log.warning("%s (or set RANA_COMPILE_CACHE): kernels are built in %s for this run only", error, fallback)
        return fallback


def build(compiler: str, library: Path) -> Path:
    """The library, compiled. Raises RanaError with the compiler's words."""
    log.info("building CPU kernels in %s (about half a minute, once per machine)", library.parent)
    with replacing(library) as temporary:
        command = [compiler, *_flags(), str(SOURCE), *_shared_runtime(compiler), *_torch_flags(), "-o", str(temporary)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RanaError(
                f"{compiler} could not build the CPU kernels in {library.parent} (RANA_COMPILE_CACHE chooses another "
                f"place, CXX another compiler):\n{result.stderr[-2000:]}"
            )
    return library


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("RANA_COMPILE_CXXFLAGS", ""))]


def _shared_runtime(compiler: str) -> list[str]:
    """The C++ runtime that PyTorch uses, by path: else a static one may be linked in (seen on an image with g++ 13).

    With two runtimes in a process, writing a number to a stream, as errors' messages do, crashes.
    """
    command = [compiler, "-print-file-name=libstdc++.so.6"]
    path = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return [path] if Path(path).is_absolute() else []


def _torch_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    abi = int(torch.compiled_with_cxx11_abi())
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    return [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", *includes, *libraries, "-lc10", "-ltorch_cpu"]


def _fingerprint(compiler: str) -> str:
    """Hash of what the library depends on, the processor ``-march=native`` stands for included."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = "".join(file.read_text() for file in (SOURCE, *HEADERS))
    parts = (sources, torch.__version__, version, " ".join(_flags()), platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
