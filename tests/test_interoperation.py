"""Beside other tools: torch.export, TORCH_LOGS, TORCH_TRACE, pipelines, the harness, trl, model directories."""

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_llama, tokens
from tiny_models import build, byte_tokenizer

import rana_compile
from rana_compile import Plan, PlanError
from rana_compile.testing import count_compilations

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("name", "recipe"), [("Llama", "auto"), ("Llama", "rana"), ("GPT-2", "neuron")])
def test_export_of_the_exportable_module_is_the_formulas(name: str, recipe: str, tmp_path: Path) -> None:
    model = tiny_llama(layers=1, num_key_value_heads=4) if recipe == "rana" else build(name, layers=1)[0]
    ids = tokens(6)
    plan = rana_compile.calibrate(model, ids, 0.8, recipe, progress=False)
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        expected = run(input_ids=ids[0]).logits
    module = rana_compile.Exportable(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=ids[0]).logits, expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(module, (), {"input_ids": ids[0], "use_cache": False})
    torch.export.save(program, tmp_path / "program.pt2")
    loaded: Any = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(loaded(input_ids=ids[0], use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - model(input_ids=ids[0]).logits).abs().max() > 1e-3  # the masks do something


def test_export_of_a_compiled_model_is_the_dense_model() -> None:
    """As documented: ``torch.export`` traces the module, and adapters live in compiled graphs."""
    model, (ids, *_) = tiny_llama(layers=1), tokens(4)
    plan = rana_compile.calibrate(model, tokens(4), 0.5, "neuron", progress=False)
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
        exported: Any = program.module()
        torch.testing.assert_close(exported(input_ids=ids, use_cache=False).logits, dense, rtol=1e-4, atol=1e-4)


def test_exportable_refuses_a_foreign_plan() -> None:
    plan = rana_compile.calibrate(tiny_llama(layers=1), tokens(2), 0.8, "neuron", progress=False)
    with pytest.raises(PlanError, match="calibrate this model"):
        rana_compile.Exportable(tiny_llama(layers=1, hidden_size=32), plan)


SCRIPT = """
import torch, rana_compile
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64))
plan = rana_compile.calibrate(model, [{"input": torch.randn(64, 64)} for _ in range(4)], 0.6, "neuron", progress=False)
with torch.no_grad():
    torch.compile(model, backend="rana", options={"plan": plan, "compiler": "eager"})(torch.randn(1, 64))
"""


def test_torch_logs_and_torch_trace_know_the_backend(tmp_path: Path) -> None:
    settings = {"TORCH_LOGS": "+rana_compile", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=True
    )
    assert "adapted 2 of 2 sites in a graph" in done.stderr
    traced = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert '"name": "rana_adapted_graph"' in traced and "rana_neuron_decode" in traced


def test_a_plan_beside_the_weights_is_one_line_to_use(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = build("Llama", layers=1)
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    model.save_pretrained(tmp_path)
    plan.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded.compile(backend="rana", options={"plan": tmp_path, "compiler": "eager"})
    (ids,) = tokens(1, seed=3)
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(Plan.from_pretrained(tmp_path).adapted) == len(plan.adapted)


def test_a_pipeline_gives_the_adapted_models_text() -> None:
    from transformers import pipeline

    model, _ = build("Llama", layers=1)
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", progress=False)
    prompt, tokenizer = "a short walk", byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with rana_compile.adapted(model, plan) as run, torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, run(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    generator.model.compile(backend="rana", options={"plan": plan, "compiler": "eager"})
    (result,) = generator(prompt, max_new_tokens=6, do_sample=False)
    assert result["generated_text"].endswith(tokenizer.decode(ids[0, -6:], skip_special_tokens=True))


def test_the_harness_scores_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-evaluation-harness, unchanged, on a task made of local text: dense and compiled at full budget agree."""
    pytest.importorskip("lm_eval")
    spec = importlib.util.spec_from_file_location("lm_eval_run", ROOT / "examples/lm_eval_run.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, _ = build("Llama", layers=1)
    dense = example.evaluated(model, byte_tokenizer(), 6)
    plan = rana_compile.calibrate(model, tokens(4), 1.0, "neuron", progress=False)
    model.compile(backend="rana", dynamic=True, options={"plan": plan, "compiler": "eager"})
    with count_compilations() as counts, torch.no_grad():
        scores = example.evaluated(model, byte_tokenizer(), 6)
    assert counts.graphs > 0
    assert {k: v for k, v in scores.items() if k.startswith("acc,")} == {
        k: v for k, v in dense.items() if k.startswith("acc,")
    }


def test_trls_trainer_trains_a_compiled_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, _ = build("Llama", layers=1)
    plan = rana_compile.calibrate(model, tokens(4), 0.6, "neuron", exclude="lm_head", progress=False)  # read in chunks
    model.requires_grad_(True).compile(backend="rana", options={"plan": plan, "compiler": "aot_eager"})
    names = set(model.state_dict())
    (ids,) = tokens(1)
    settings = {"max_steps": 8, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "max_length": ids.shape[1]}
    arguments = SFTConfig(
        str(tmp_path), **settings, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True
    )
    data = Dataset.from_dict({"input_ids": ids.tolist() * 8})
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=byte_tokenizer())
    with caplog.at_level(logging.INFO, "rana_compile.backend"):
        trainer.train()
    assert f"adapted {len(plan.adapted)} of {len(plan.sites)} sites" in caplog.text
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "final"))
    assert set(type(model).from_pretrained(tmp_path / "final").state_dict()) == names
