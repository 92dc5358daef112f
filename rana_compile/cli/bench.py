"""``rana-compile bench``: decode speed of one sequence, adapted against dense, both compiled, in turns.

Before a speed counts, the tokens that the compiled model chose are compared with those of the plain formulas.
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from rana_compile.cli.inputs import load
from rana_compile.cli.screen import Screen
from rana_compile.evaluation import adapted
from rana_compile.plan import Plan

AGREEMENT = 0.7  # of the plain formulas' choices: a coordinate that rounding moves across its threshold changes more


class TokenClock(BaseStreamer):
    """Notes when each token is out; the first call of ``put`` brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def decoded_per_second(self) -> float:
        """Prefill, which ends with the first new token, does not count."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


def generated(model: Any, prompt: Any, tokenizer: Any, tokens: int) -> tuple[float, Tensor]:
    """(decoded tokens per second, token ids [prompt + tokens]): greedy, static cache."""
    clock = TokenClock()
    ids = model.generate(
        **prompt,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=tokenizer.eos_token_id or 0,
        streamer=clock,
    )
    return clock.decoded_per_second, ids[0]


def run(settings: argparse.Namespace, screen: Screen) -> int:
    plan = Plan.load(settings.plan)
    model, tokenizer = load(settings, screen)
    plan.check(model)
    torch.manual_seed(0)
    prompt = tokenizer(settings.prompt, return_tensors="pt").to(settings.device)
    other = copy.deepcopy(model)
    model.compile(backend=settings.compiler)
    other.compile(backend="rana", options={"plan": plan, "compiler": settings.compiler})
    tokens = max(settings.new_tokens, 3)  # the rate needs two decoded ones after the prompt's
    for name, which in (("dense", model), ("adapted", other)):
        with screen.stage(f"compiling the {name} model"):
            generated(which, prompt, tokenizer, tokens)
            _, ids = generated(which, prompt, tokenizer, tokens)
    pairs = []
    with screen.steps("timing in turns", settings.rounds) as step:
        for _ in range(settings.rounds):
            pairs.append(tuple(generated(which, prompt, tokenizer, tokens)[0] for which in (model, other)))
            step()
    agreement = _agreement(other, plan, ids, prompt["input_ids"].shape[1])
    return _told(settings, screen, pairs, agreement, tokenizer.decode(ids, skip_special_tokens=True))


def _agreement(model: Any, plan: Plan, ids: Tensor, start: int) -> float:
    """Of the tokens that the compiled model chose, the share that the plain formulas choose in their places."""
    choices, cache, position = [], None, 0
    with adapted(model, plan) as plain, torch.no_grad():
        for end in range(start, len(ids)):  # the prompt, then token by token, as it was generated
            out = plain(input_ids=ids[None, position:end], past_key_values=cache, use_cache=True)
            choices.append(int(out.logits[0, -1].argmax()))
            cache, position = out.past_key_values, end
    return float((torch.tensor(choices) == ids[start:].cpu()).float().mean())


def _told(settings: argparse.Namespace, screen: Screen, pairs: list[Any], agreement: float, text: str) -> int:
    dense, adapted_rates = (list(rates) for rates in zip(*pairs, strict=True))
    speedup = statistics.median(adapted_rates) / statistics.median(dense)
    failed = []
    if agreement < AGREEMENT:
        failed.append(f"only {agreement:.0%} of the chosen tokens are those of the plain formulas")
    if settings.min_speedup is not None and speedup < settings.min_speedup:
        failed.append(f"the speed-up {speedup:.2f} is less than {settings.min_speedup}")
    for line in failed:
        screen.say(f"check failed: {line}")
    document = {
        "dense_tokens_per_s": statistics.median(dense),
        "adapted_tokens_per_s": statistics.median(adapted_rates),
        "speedup": speedup,
        "dense_rounds": dense,
        "adapted_rounds": adapted_rates,
        "agreement": agreement,
        "text": text,
        "failed": failed,
    }
    screen.result(document, _table(document, settings))
    return 1 if failed else 0


def _table(found: dict[str, Any], settings: argparse.Namespace) -> Table:
    compiler = "dense Inductor" if settings.compiler == "inductor" else "dense, not compiled"
    table = Table(title=f"decode, one sequence, {settings.dtype}, {torch.get_num_threads()} threads")
    for column in ("", compiler, "rana"):
        table.add_column(column, justify="right" if column else "left")
    rates = (found["dense_tokens_per_s"], found["adapted_tokens_per_s"])
    table.add_row("tokens/s, median", f"{rates[0]:.1f}", f"{rates[1]:.1f} ({found['speedup']:.2f}×)")
    rounds = ("dense_rounds", "adapted_rounds")
    table.add_row("rounds", *(" ".join(f"{rate:.1f}" for rate in found[key]) for key in rounds))
    table.add_row("tokens as the plain formulas choose", "", f"{found['agreement']:.0%}")
    return table
