"""A plan as one self-contained HTML page: what it costs and keeps, layer by layer; no network is needed to view it."""

import csv
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rana_compile.environment import environment
from rana_compile.picture import Observed, Point, energy_plot, layers_plot, quality_plot
from rana_compile.types import ConfigError

if TYPE_CHECKING:
    from rana_compile.plan import Plan, SitePlan

_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.*)$")


def page_of(plan: "Plan", points: Sequence[Point] = (), observed: Observed | None = None) -> str:
    """The whole page. Raises RanaError if matplotlib is missing."""
    grid = _grid(plan)
    sections = [
        _section("Quality against cost", _points_text(), quality_plot(points, plan.flops_kept)) if points else "",
        _section("FLOPs kept, layer by layer", _HEAT, _heat_map(grid)),
        _layers(grid, observed),
        _section("Energy of the outputs", _ENERGY, energy_plot(observed.energy)) if observed else "",
        _section("Sites", "", _sites(plan)),
        _section("Left alone", _skipped_text(plan), _skipped(plan)),
        _section("Where this comes from", "", _environment(plan)),
    ]
    style = files("rana_compile").joinpath("page.css").read_text(encoding="utf-8")
    recipe = escape(str(plan.info.get("recipe", "?")))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>rana_compile plan</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kicker">rana_compile plan · recipe {recipe}</p>\n'
        f"<h1>{plan.flops_kept:.1%} of the FLOPs, {len(plan.adapted)} of {len(plan.sites)} sites adapted</h1>\n"
        f"{_tiles(plan)}</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


_HEAT = (
    "Each cell is one linear map, or a stack that shares its input; the number is the share of its FLOPs that the mean "
    "token takes, in percent; darker takes more. Point at a cell for its adapter."
)
_SPREAD = (
    "Tokens differ: the line is the mean on calibration text, the bands hold half and nine tenths of {:,} tokens of "
    "the text given."
)
_MEANS = "The mean token on calibration text. Give text (--model, --text) to see how tokens differ."
_ENERGY = (
    "What a rank adapter could live on: how much of a site's output its largest directions hold, on the text given. "
    "High curves promise more than they keep: see the method page on why energy is not quality."
)


def _points_text() -> str:
    return "Measured on held-out text, masks on for every scored token. Lower and further left is better."


def read_points(path: str | os.PathLike[str]) -> list[Point]:
    """The points in the file of ``rana-compile sweep``, or in a CSV with columns method, kept and increase.

    Raises ConfigError if it is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text)["points"] if text.lstrip().startswith("{") else list(csv.DictReader(text.splitlines()))
        found = [Point(str(r["method"]), float(r["kept"]), float(r["increase"])) for r in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"no points in {str(path)!r} ({error!r}); expected what `rana-compile sweep` writes"
        ) from error
    if not found:
        raise ConfigError(f"no points in {str(path)!r}: the table is empty")
    return found


def layer_of(name: str) -> tuple[int | None, str]:
    """(layer, kind) of a site: (3, ``mlp.down_proj``) of ``model.layers.3.mlp.down_proj``; (None, name) without one."""
    match = _LAYER.match(name)
    return (int(match[2]), match[3]) if match else (None, name)


Grid = dict[str, dict[int | None, "SitePlan"]]  # kind -> layer -> site


def _grid(plan: "Plan") -> Grid:
    """Sites by kind and layer. Where two stacks of layers share a kind, it is named with its stack."""
    stacks: dict[tuple[int | None, str], set[str]] = {}
    for entry in plan.sites:
        stacks.setdefault(layer_of(entry.site.name), set()).add(_stack(entry.site.name))
    grid: Grid = {}
    for entry in plan.sites:
        layer, kind = layer_of(entry.site.name)
        several = len(stacks[layer, kind]) > 1
        grid.setdefault(f"{_stack(entry.site.name)}: {kind}" if several else kind, {})[layer] = entry
    return dict(sorted(grid.items(), key=lambda item: None in item[1]))


def _stack(name: str) -> str:
    match = _LAYER.match(name)
    return (match[1] or "") if match else ""


def _section(title: str, text: str, body: str) -> str:
    about = f"<p>{escape(text)}</p>\n" if text else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{about}{body}\n</section>\n"


def _tiles(plan: "Plan") -> str:
    quality = plan.info.get("divergence"), plan.loss_increase
    told = [f"{nats:.4f}" if isinstance(nats, float) else "not measured" for nats in quality]
    tiles = {
        "asked": f"{plan.flops_asked:.1%}",
        "realised": f"{plan.flops_kept:.1%}",
        "of all linears": f"{plan.flops_kept_model:.1%}",
        "divergence, nats per token": told[0],
        "predicted loss increase": told[1],
        "calibration tokens": f"{plan.info.get('tokens', 0):,}",
    }
    return '<dl class="tiles">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in tiles.items()) + "</dl>\n"


def _heat_map(grid: Grid) -> str:
    layers = sorted({layer for row in grid.values() for layer in row if layer is not None})
    head = "".join(f"<th scope=col>{layer}</th>" for layer in layers)
    lines = [f"<tr><th></th>{head}</tr>"] if layers else []
    shares = [entry.flops_kept for row in grid.values() for entry in row.values()]
    least, span = min(shares, default=0.0), max(max(shares, default=1.0) - min(shares, default=0.0), 0.1)

    def cell(entry: "SitePlan | None") -> str:
        return "<td class=none></td>" if entry is None else _cell(entry, (entry.flops_kept - least) / span)

    for kind, row in grid.items():
        if None in row:
            cells = cell(row[None]) + (f"<td class=none colspan={len(layers) - 1}></td>" if len(layers) > 1 else "")
        else:
            cells = "".join(cell(row.get(layer)) for layer in layers)
        lines.append(f"<tr><th scope=row>{escape(kind)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="heat">{"".join(lines)}</table></div>'


def _cell(entry: "SitePlan", shade: float) -> str:
    """``shade``: how dark, from 0 for the cheapest site to 1 for the dearest."""
    share, site = 100 * entry.flops_kept, entry.site
    live = " + ".join(f"{n:.0f}" for n in entry.live)
    about = f"{site.name}\n{site.d_in} → {site.d_out}, {entry.family}" + (f", mean live {live}" if live else "")
    about += f"\n{share:.1f}% of its FLOPs, predicted divergence {entry.error:.2g} nats"
    kind = " class=dense" if entry.family == "dense" else ""
    return f'<td{kind} style="--share:{100 * shade:.0f}%" title="{escape(about)}">{share:.0f}</td>'


def _layers(grid: Grid, observed: Observed | None) -> str:
    rows = {kind: row for kind, row in grid.items() if None not in row}
    if not rows:
        return ""
    means = {kind: {n: e.flops_kept for n, e in row.items() if n is not None} for kind, row in rows.items()}
    live: dict[str, dict[int, Sequence[float]]] = {}
    for kind, row in rows.items() if observed else ():
        found = ((n, observed.live.get(e.site.name)) for n, e in row.items() if observed)
        live[kind] = {n: quantiles for n, quantiles in found if n is not None and quantiles is not None}
    text = _SPREAD.format(observed.tokens) if observed else _MEANS
    return _section("What a token takes", text, layers_plot(means, live))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        aligned = (" class=number" if i in numbers else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{a}>{escape(c)}</{tag}>" for a, c in zip(aligned, cells, strict=True)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table class="list"><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _sites(plan: "Plan") -> str:
    from rana_compile.report import site_cells

    head = ("site", "family", "rank", "mean live", "FLOPs kept", "predicted divergence")
    table = _table(head, map(site_cells, plan.sites), numbers=(2, 3, 4, 5))
    return f"<details><summary>all {len(plan.sites)}</summary>{table}</details>"


def _skipped_text(plan: "Plan") -> str:
    return "" if plan.skipped else "Nothing: every linear of the model is a site."


def _skipped(plan: "Plan") -> str:
    return _table(("weight or block", "reason"), ((s.name, s.reason) for s in plan.skipped)) if plan.skipped else ""


def _environment(plan: "Plan") -> str:
    fitted = {k: _plain(v) for k, v in plan.info.items() if v is not None}
    tables = (_table(("the fit", ""), fitted.items()), _table(("this page", ""), environment().items()))
    return f'<div class="pair">{"".join(tables)}</div>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
