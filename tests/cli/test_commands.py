"""Each command on a tiny model in a directory: what it prints, what it writes, and the exit status."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import run_cli as run

from rana_compile import Plan

SMALL = ("--length", "32", "--tokens", "256")


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command with ``--json`` and gives (status, document); nothing else is on standard output."""

    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        status = run(*arguments, "--json")
        return status, json.loads(capsys.readouterr().out)

    return call


def test_calibrate_writes_the_plan_and_says_what_it_keeps(
    model_directory: Path, text: Path, tmp_path: Path, document: Any
) -> None:
    status, found = document(
        "calibrate", model_directory, "--text", text, *SMALL, "--flops-budget", 0.8, "--recipe", "neuron",
        "--exclude", "lm_head", "-o", tmp_path,
    )  # fmt: skip
    assert status == 0
    assert [p.name for p in tmp_path.iterdir()] == ["rana_plan.safetensors"]  # into a directory under its usual name
    plan = Plan.from_pretrained(tmp_path)
    assert (found["flops_asked"], found["flops_kept"], found["adapted"]) == (0.8, plan.flops_kept, len(plan.adapted))
    assert "lm_head.weight" in [s.name for s in plan.skipped]


def test_show_prints_the_table(plan: Path, capsys: pytest.CaptureFixture[str], document: Any) -> None:
    assert run("show", plan) == 0
    out = capsys.readouterr().out
    assert out == f"{Plan.load(plan)}\n"
    status, found = document("show", plan)
    assert status == 0 and {s["name"] for s in found["sites"]} == {s.site.name for s in Plan.load(plan).sites}


def test_eval_measures_and_checks(model_directory: Path, plan: Path, text: Path, document: Any) -> None:
    arguments = ("eval", model_directory, plan, "--text", text, *SMALL)
    status, found = document(*arguments)
    assert status == 0 and found["failed"] == []
    assert found["kept"] == pytest.approx(0.7, abs=0.1)
    assert found["increase"] == pytest.approx(found["loss"] - found["dense_loss"])
    assert 0 < found["divergence"] and 0 < found["agreement"] < 1
    status, found = document(*arguments, "--max-loss-increase", "-9", "--max-cost", "0.99")
    assert (status, found["failed"]) == (1, ["loss increase"])


def test_bench_takes_turns_and_checks(model_directory: Path, plan: Path, document: Any) -> None:
    """Without Inductor, whose minutes other tests pay; the adapted graph and the counting are the same."""
    arguments = ("bench", model_directory, plan, "--new-tokens", 8, "--rounds", 2, "--compiler", "eager")
    status, found = document(*arguments)
    assert status == 0
    assert len(found["dense_rounds"]) == len(found["adapted_rounds"]) == 2
    assert found["agreement"] >= 0.9
    status, found = document(*arguments, "--min-speedup", "1e9")
    assert status == 1 and "less than 1000000000.0" in found["failed"][0]


def test_explain_needs_no_tokenizer(model_directory: Path, plan: Path, document: Any, tmp_path: Path) -> None:
    bare = shutil.copytree(model_directory, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    status, found = document("explain", bare, "--plan", plan)
    assert status == 0 and len(found["sites"]) > 4


def test_explain_lists_sites(model_directory: Path, plan: Path, document: Any) -> None:
    status, found = document("explain", model_directory, "--plan", plan)
    assert status == 0
    assert {s["site"]["name"] for s in found["sites"]} == {s.site.name for s in Plan.load(plan).sites}
    assert {s["rows"] for s in found["sites"]} == {1}


@pytest.mark.parametrize(("rows", "kind"), [(1, "_decode"), (5, "rana_neuron")])
def test_graph_before_and_after(model_directory: Path, plan: Path, document: Any, rows: int, kind: str) -> None:
    status, found = document(
        "explain", model_directory, "--plan", plan, "--graph", "model.layers.0.mlp", "--rows", rows
    )
    assert status == 0
    before = [line.partition(" = ")[2].partition("(")[0] for line in found["before"]]
    assert before == ["linear", "silu", "linear", "mul", "linear"]
    assert "gate_proj.weight" in found["before"][0]
    assert any(kind in line for line in found["after"])
    assert not any(" linear(" in line for line in found["after"])


def test_graph_without_a_plan_and_of_no_module(
    model_directory: Path, capsys: pytest.CaptureFixture[str], document: Any
) -> None:
    assert run("explain", model_directory, "--graph", "lm_head") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("before: lm_head") and "--plan" in captured.err
    status, found = document("explain", model_directory, "--graph", "model.layers.9")
    assert status == 2 and "no module 'model.layers.9'" in found["error"]


def test_a_sweep_that_reaches_no_budget(model_directory: Path, text: Path, tmp_path: Path, document: Any) -> None:
    status, found = document(
        "sweep", model_directory, "--text", text, *SMALL, "--test-tokens", 64, "--recipe", "rana",
        "--budgets", 0.05, 0.1, "-o", tmp_path,
    )  # fmt: skip
    assert status == 2 and "no budget can be reached: 10%: " in found["error"]
    assert list(tmp_path.iterdir()) == []


def test_sweep_measures_a_plan_for_each_budget(
    model_directory: Path, text: Path, tmp_path: Path, document: Any
) -> None:
    status, found = document(
        "sweep", model_directory, "--text", text, *SMALL, "--test-tokens", 64, "--recipe", "neuron",
        "--budgets", 0.6, 0.9, "-o", tmp_path,
    )  # fmt: skip
    assert status == 0 and found == json.loads((tmp_path / "sweep.json").read_text())
    first, second = found["points"]
    assert (first["asked"], second["asked"], first["tokens"]) == (0.9, 0.6, 62)
    assert first["kept"] > second["kept"] and first["divergence"] < second["divergence"]
    assert Plan.load(first["plan"]).flops_asked == 0.9


def test_doctor_tests_every_kernel(document: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = document("doctor")
    assert {c["name"]: c["ok"] for c in found["checks"]} == dict.fromkeys([c["name"] for c in found["checks"]], True)
    assert status == 0 and len(found["checks"]) >= 8 and found["environment"]["torch"] != "missing"
    monkeypatch.setattr("rana_compile.kernels.reference.rank_linear", lambda x, *rest: 2 * x[:, :65])
    status, found = document("doctor")
    assert status == 1 and [c["name"] for c in found["checks"] if not c["ok"]] == ["rana::rank_linear, cpu"]


def test_show_runs_the_model_for_the_page(model_directory: Path, plan: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("show", plan, "--html", page, "--model", model_directory, "--text", text, *SMALL) == 0
    assert "of 256 tokens" in page.read_text(encoding="utf-8")
