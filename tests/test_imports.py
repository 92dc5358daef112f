"""Imports go one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, needs_sources

# A module imports only from its own row or from rows above it. A new module needs a place here.
LAYERS = (
    {
        "types",
        "config",
        "flops",
        "progress",
        "data",
        "files",
        "documents",
        "checks",
        "memory",
        "text",
        "loading",
        "environment",
        "interrupts",
        "offload",
        "sampling",
        "processes",
        "room",
    },
    {"kernels"},
    {
        "adapters",
        "allocation",
        "statistics",
        "objective",
        "fitting",
        "recipes",
        "plan",
        "probe",
        "report",
        "binding",
        "picture",
        "page",
        "exporting",
    },
    {"passes"},
    {"learning"},
    {"correction", "checkpoint"},
    {"calibration", "evaluation", "observation", "quality"},
    {"recorded"},
    {"self_calibration", "profiled", "wrapped_generate"},
    {"backend"},
    {"outlook", "testing"},
    {"cli"},
)
LAYER_OF = {module: i for i, layer in enumerate(LAYERS) for module in layer}
LAZY_ROOT = ROOT / "rana_compile" / "__init__.py"  # names what users import, and imports it when asked
HEAVY = ("triton", "torch._inductor", "transformers", "datasets", "matplotlib")


def sources() -> Iterator[tuple[Path, str]]:
    """Each source file and the member of ``LAYERS`` it belongs to."""
    for path in sorted((ROOT / "rana_compile").glob("*.py")):
        if path != LAZY_ROOT:
            yield path, path.stem
    folders = {"adapters": "rana_compile/adapters", "cli": "rana_compile/cli", "passes": "passes", "kernels": "kernels"}
    for package, folder in folders.items():
        yield from ((path, package) for path in sorted((ROOT / folder).rglob("*.py")))


def imported(path: Path) -> Iterator[str]:
    """Absolute names imported anywhere in a file; ``from a.b import c`` gives ``a.b.c``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.relative_to(ROOT)}:{node.lineno}: relative import; import absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@needs_sources
def test_every_module_has_a_layer() -> None:
    assert {module for _, module in sources()} <= set(LAYER_OF)


@needs_sources
def test_imports_go_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} ({module}) imports {name}"
        for path, module in sources()
        for name in imported(path)
        if name.startswith("rana_compile.")
        and LAYER_OF.get(name.split(".")[1], len(LAYERS)) > LAYER_OF.get(module, len(LAYERS))
    ]
    assert wrong == []


@needs_sources
def test_kernels_know_nothing_of_sites_plans_or_models() -> None:
    """Of the rest of the package they may raise its errors, and write files as it does, no more."""
    names = {name for path, module in sources() if module == "kernels" for name in imported(path)}
    own = {name for name in names if name.startswith("rana_compile.") and not name.startswith("rana_compile.kernels")}
    assert [
        name
        for name in sorted(own)
        if not (name.startswith("rana_compile.types.") and name.endswith("Error"))
        and not name.startswith("rana_compile.files.")
    ] == []


@needs_sources
def test_no_import_of_the_folders_as_top_level_packages() -> None:
    """Hugging Face ships a package called ``kernels``."""
    everywhere = [path for path, _ in sources()] + sorted((ROOT / "tests").rglob("*.py"))
    names = {(path.relative_to(ROOT), name) for path in everywhere for name in imported(path)}
    assert [(path, name) for path, name in names if name.split(".")[0] in ("kernels", "passes")] == []


@pytest.mark.parametrize("module", ["rana_compile", "rana_compile.plan", "rana_compile.config"])
def test_import_is_lean(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
