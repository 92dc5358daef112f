"""What can be written behind ``rana-compile``. Nothing heavy is imported here: ``--help`` answers at once."""

import argparse
from pathlib import Path

import rana_compile

DESCRIPTION = """\
Compute, token by token, only the ranks and neurons of a language model that matter.

  rana-compile calibrate MODEL --text corpus.txt -o plan.safetensors
  rana-compile eval MODEL plan.safetensors --text other.txt
  rana-compile show plan.safetensors --html plan.html

MODEL is a directory, a hub name or a GGUF file. Exit status: 0 done; 1 a check that was asked for failed; 2 the input
is not acceptable; 3 it could not be done; 130 interrupted.
"""
MODEL = "directory, hub name or GGUF file of a causal language model"
PLAN = "a saved plan, or a model's directory that holds one"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        "rana-compile", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"rana-compile {rana_compile.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_calibrate, _show, _eval, _bench, _explain, _sweep, _doctor):
        add(commands)
    return top


def _command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, module: str, about: str):  # type: ignore[no-untyped-def]
    one = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    one.set_defaults(command=module)
    one.add_argument("--json", action="store_true", help="the result as one JSON document on standard output")
    one.add_argument("--quiet", action="store_true", help="no progress, no remarks")
    one.add_argument("--debug", action="store_true", help="errors with their traceback")
    return one


def _model(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", metavar="MODEL", help=MODEL)
    one.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    one.add_argument("--device", default="cpu", help='"cpu", "cuda", "cuda:1"')


def _text(one: argparse.ArgumentParser, tokens: int, required: bool = True) -> None:
    one.add_argument("--text", type=Path, nargs="+", metavar="FILE", required=required, help="plain text, UTF-8")
    one.add_argument("--tokens", type=_count, default=tokens, help=f"to take, from all over the text ({tokens:,})")
    one.add_argument("--length", type=_count, default=512, help="tokens of a window (512)")
    one.add_argument("--seed", type=int, default=0, help="which windows, and what else is drawn (0)")


def _sites(one: argparse.ArgumentParser) -> None:
    one.add_argument("--recipe", choices=("auto", "neuron", "rana"), default="auto", help="(auto)")
    one.add_argument(
        "--include", nargs="+", metavar="PATTERN", help="only parameters whose names match, e.g. '*.mlp.*'"
    )
    one.add_argument("--exclude", nargs="+", metavar="PATTERN", help="not these, e.g. lm_head")
    one.add_argument(
        "--learning-steps", type=_whole, metavar="N",
        help="in which thresholds move together, for quality (256 on an accelerator, 0 on a CPU)",
    )  # fmt: skip


def _calibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _command(commands, "calibrate", "calibrate", "fit a plan to a model on text; a killed run goes on")
    _model(one)
    _text(one, 8192)
    _sites(one)
    budget = one.add_mutually_exclusive_group()
    budget.add_argument("--flops-budget", type=float, metavar="SHARE", help="FLOPs to keep per token (0.6)")
    budget.add_argument("--bytes-budget", type=float, metavar="SHARE", help="or: bytes read per decoded token")
    budget.add_argument("--max-loss-increase", type=float, metavar="NATS", help="or: divergence to stay below")
    one.add_argument("-o", "--out", type=Path, required=True, help="the plan, or a directory to put it into")
    one.add_argument(
        "--save-every", type=float, default=15, metavar="SECONDS", help="what was recorded, beside it (15)"
    )
    one.add_argument("--no-resume", action="store_true", help="forget what a killed run recorded")


def _show(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _command(commands, "show", "show", "a plan as a table, or as one HTML page")
    one.add_argument("plan", metavar="PLAN", help=PLAN)
    one.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page")
    one.add_argument(
        "--points", type=Path, nargs="+", default=[], metavar="FILE",
        help="quality against cost for the page: the file of `sweep`, the quality.csv of benchmarks/quality.py",
    )  # fmt: skip
    one.add_argument("--model", help=f"for the page: {MODEL}; with --text shows live shares token by token")
    one.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of its weights")
    one.add_argument("--device", default="cpu")
    _text(one, 2048, required=False)


def _eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _command(commands, "eval", "evaluate", "perplexity, divergence and realised cost on text, against dense")
    _model(one)
    one.add_argument("plan", metavar="PLAN", help=PLAN)
    _text(one, 4096)
    one.add_argument("--max-loss-increase", type=float, metavar="NATS", help="exit with 1 if the loss rises by more")
    one.add_argument("--max-cost", type=float, metavar="SHARE", help="exit with 1 if more FLOPs are realised")


def _bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _command(commands, "bench", "bench", "decode speed of one sequence, against dense Inductor, in turns")
    _model(one)
    one.add_argument("plan", metavar="PLAN", help=PLAN)
    one.add_argument("--prompt", default="The capital of France is", help="(%(default)s)")
    one.add_argument("--new-tokens", type=_count, default=64, help="of a round (64)")
    one.add_argument("--rounds", type=_count, default=4, help="of each model (4)")
    one.add_argument("--compiler", choices=("inductor", "eager"), default="inductor", help="(inductor)")
    one.add_argument("--min-speedup", type=float, metavar="RATIO", help="exit with 1 if it is less")


def _explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _command(commands, "explain", "explain", "what would be done with every linear, and why; nothing is compiled")
    _model(one)
    one.add_argument("--plan", metavar="PLAN", help=PLAN)
    one.add_argument("--rows", type=_count, default=1, help="tokens of the call that is looked at (1: decode)")
    one.add_argument("--graph", metavar="LAYER", help="the graph of one module, e.g. model.layers.0, before and after")
    one.add_argument("--include", nargs="+", metavar="PATTERN")
    one.add_argument("--exclude", nargs="+", metavar="PATTERN")


def _sweep(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    one = _command(commands, "sweep", "sweep", "quality against cost: a plan for each budget, measured on other text")
    _model(one)
    _text(one, 8192)
    _sites(one)
    one.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5], metavar="SHARE")
    one.add_argument(
        "--test-text", type=Path, nargs="+", metavar="FILE", help="to measure on; without, windows of --text"
    )
    one.add_argument("--test-tokens", type=_count, default=4096, help="(4,096)")
    one.add_argument("-o", "--out", type=Path, required=True, help="directory for sweep.json and the plans")


def _doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _command(commands, "doctor", "doctor", "versions, compiler, devices, and a self-test of each kernel")


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; 0 for none")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
