"""A tiny model with its tokenizer in a directory, and text, as a user has them; and a plan made by the command."""

from pathlib import Path

import pytest
from tiny_models import build, byte_tokenizer

from rana_compile.cli import main
from rana_compile.text import read_texts

PROSE = "the quick brown fox jumps over a lazy dog, and then {} times it sleeps in the sun by the river. "
SMALL = ("--length", "32", "--tokens", "256")


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model, _ = build("Llama", layers=1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(PROSE.format(i) for i in range(60)), encoding="utf-8")
    assert read_texts([path])[0]
    return path


@pytest.fixture(scope="session")
def plan(model_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    arguments = ["calibrate", str(model_directory), "--text", str(text), *SMALL, "--quiet", "-o", str(path)]
    assert main([*arguments, "--recipe", "neuron", "--flops-budget", "0.7"]) == 0
    return path
