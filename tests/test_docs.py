"""The documents do what they say: their commands and code run in order, their links lead somewhere, and the reference
is the one that the docstrings give."""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from support import blocks, run_cli
from tiny_models import build, byte_tokenizer

import rana_compile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROSE = "the quick brown fox jumps over a lazy dog, and then {} times it sleeps in the sun by the river. "


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a model and text, as the guide supposes. Inductor is left out, which other tests run."""
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, **_: gm)
    monkeypatch.chdir(tmp_path)
    model, _ = build("Llama", layers=1)
    model.save_pretrained("my-model")
    byte_tokenizer().save_pretrained("my-model")
    for name, first in (("corpus.txt", 0), ("other.txt", 500)):
        text = "".join(PROSE.format(i) for i in range(first, first + 30))
        Path(name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_guide_runs_as_it_stands(workplace: Path) -> None:
    names: dict[str, Any] = {}
    for language, text in blocks(ROOT / "docs/guide.md", "bash", "python"):
        if language == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            assert line.startswith("rana-compile ")
            assert run_cli(*shlex.split(line)[1:], "--quiet") == 0, line
    made = {path.name for path in workplace.iterdir()}
    assert {"plan.html", "plan.safetensors", "sweep"} <= made and "calibration.recording" not in made
    assert (workplace / "my-model/rana_plan.safetensors").exists()


def test_the_readme_runs_as_it_stands(workplace: Path) -> None:
    """But for the set-up commands, each block with a fresh model."""
    for language, text in blocks(ROOT / "README.md", "bash", "python"):
        if language == "python":
            model, _ = build("Llama", layers=1)
            batches = [torch.randint(3, 100, (1, 32)) for _ in range(8)]
            inputs = {"input_ids": batches[0], "attention_mask": torch.ones_like(batches[0])}
            exec(text, {"rana_compile": rana_compile, "model": model, "batches": batches, "inputs": inputs})
            continue
        for line in text.splitlines():
            command, *rest = shlex.split(line.replace("MODEL", "my-model"), comments=True)
            assert command in ("make", "pip") or run_cli(*rest, "--quiet") == 0, line
    assert {"plan.html", "model-directory"} <= {path.name for path in workplace.iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """As the sites that show Markdown make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("docs_reference", ROOT / "docs/reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page_text() == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), (
        "docs/reference.md is not what the docstrings give: python docs/reference.py"
    )


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {f"docs/{page.name}" for page in PAGES[2:]} <= {link.partition("#")[0] for link in linked}
