"""Score a model with lm-evaluation-harness, dense and compiled with a plan, on a task made from a local file.

    python examples/lm_eval_run.py --limit 100

The harness sees a Hugging Face model as always; the one line is ``model.compile(backend="rana", …)``. Needs the extra
``eval``. The task: which of four paragraphs of Python's documentation goes on where the text breaks off.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from inputs import load_smollm2, pydoc_topics, unseen_topics
from rich.console import Console
from rich.table import Table

import rana_compile

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
NAME = "continuation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops-budget", type=float, default=0.7)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--limit", type=int, default=200, help="questions")
    settings = parser.parse_args()
    model, tokenizer = load_smollm2()
    batches = pydoc_topics(tokenizer, 512, settings.calibration_tokens // 512, 1)[0].split(1)
    plan = rana_compile.calibrate(model, batches, settings.flops_budget, exclude=["lm_head"])
    results = [("dense", evaluated(model, tokenizer, settings.limit))]
    model.compile(backend="rana", dynamic=True, options={"plan": plan})
    results.append((f"rana, {plan.flops_kept:.1%} of the FLOPs", evaluated(model, tokenizer, settings.limit)))
    table = Table("model", "acc", "acc_norm", title=f"{settings.limit} questions, masks on for every scored token")
    for name, scores in results:
        table.add_row(name, *(f"{scores[f'{metric},none']:.3f}" for metric in ("acc", "acc_norm")))
    Console().print(table)


def evaluated(model: Any, tokenizer: Any, limit: int) -> dict[str, float]:
    """The harness' scores of a model as it is: dense, or compiled."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder), questions(unseen_topics(), limit))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        wrapper = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
        scores = simple_evaluate(wrapper, tasks=[NAME], task_manager=tasks, bootstrap_iters=0)
    assert scores is not None
    return scores["results"][NAME]


def write_task(folder: Path, documents: list[dict[str, Any]]) -> None:
    """A task of the harness, and its data, as files."""
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    (folder / f"{NAME}.yaml").write_text(TASK.format(name=NAME, data=data), encoding="utf-8")


def questions(texts: list[str], limit: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two paragraphs of a text, and four that might follow: the next one, and three of other texts."""
    draw = random.Random(seed)
    paragraphs = [[p for p in text.split("\n\n") if 80 <= len(p) <= 600] for text in texts]
    paragraphs = [each for each in paragraphs if len(each) > 2]
    documents: list[dict[str, Any]] = []
    while len(documents) < limit:
        text, *others = draw.sample(paragraphs, 4)
        start = draw.randrange(len(text) - 2)
        choices = [text[start + 2], *(draw.choice(other) for other in others)]
        label = draw.randrange(4)
        choices[0], choices[label] = choices[label], choices[0]
        context = "\n\n".join(text[start : start + 2])
        documents.append({"text": context, "choices": ["\n\n" + c for c in choices], "label": label})
    return documents


if __name__ == "__main__":
    main()
