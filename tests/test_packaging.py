"""What gets installed: the two folders as subpackages, never as top-level packages, and the backend's entry point."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from zipfile import ZipFile

import pytest
import torch
from support import ROOT, needs_sources

FOLDERS = ("passes", "kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built without a network, from a copy without the links: a build must not depend on them, nor leave files here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for folder in ("rana_compile", *FOLDERS):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", *FOLDERS))
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(target))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = target.glob("rana_compile-*.whl")
    return ZipFile(built)


def names_of(wheel: ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


@needs_sources
def test_wheel_holds_every_source_file(wheel: ZipFile) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "rana_compile").glob("**/*.py")}
    expected.add("rana_compile/page.css")
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".cpp", ".h")]
        expected |= {f"rana_compile/{folder}/{path.name}" for path in files}
    assert expected <= names_of(wheel)


@needs_sources
def test_wheel_has_one_top_level_package(wheel: ZipFile) -> None:
    assert {name.split("/")[0] for name in names_of(wheel)} == {"rana_compile"}


@needs_sources
def test_wheel_names_the_backend_and_the_command(wheel: ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    lines = wheel.read(path).decode().split("\n")
    assert lines[lines.index("[torch_dynamo_backends]") + 1] == "rana = rana_compile.backend:rana"
    assert lines[lines.index("[console_scripts]") + 1] == "rana-compile = rana_compile.cli:main"


@needs_sources
@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_linked_and_have_no_init(folder: str) -> None:
    """Without ``__init__.py`` a probe for a top-level package of that name finds an empty namespace."""
    link = ROOT / "rana_compile" / folder
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", folder)
    assert not (ROOT / folder / "__init__.py").exists()


def test_dynamo_finds_the_backend() -> None:
    assert "rana" in {entry.name for entry in entry_points(group="torch_dynamo_backends")}
    assert "rana" in torch._dynamo.list_backends()
