"""Plots for the page of a plan, as SVG that takes its colours from the page, light or dark. Needs matplotlib."""

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from rana_compile.types import RanaError

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS = ("rana", "ours")  # methods drawn first and thicker
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# matplotlib knows no CSS: it draws in these, and the page's variables take their place
_COLOURS = {"ink": "#010203", "muted": "#040506", "grid": "#070809"}
_COLOURS |= {f"series-{i}": f"#0a0b{i:02x}" for i in range(8)}


@dataclass(frozen=True)
class Point:
    """One measured plan or method: realised share of FLOPs, and loss increase over dense, nats per token."""

    method: str
    kept: float
    increase: float


@dataclass(frozen=True)
class Observed:
    """What a plan does on some text (``rana_compile.observe``).

    Attributes:
        tokens: that were looked at.
        live: for each masked site ``QUANTILES`` over tokens of the share of its FLOPs that a token takes.
        energy: for some sites the share of the outputs' energy that their 1, 2, … largest directions hold.
    """

    tokens: int
    live: Mapping[str, Sequence[float]]
    energy: Mapping[str, Sequence[float]]


def quality_plot(points: Sequence[Point], kept: float) -> str:
    """Loss increase against realised cost: a line for each method, dense, and where this plan is."""
    with _figure(1, 1, 7.6, 3.7) as (figure, axes):
        axis = axes[0][0]
        reached = [p.increase for p in points if p.method in OURS] or [p.increase for p in points]
        top = max(min(max(p.increase for p in points), 3 * max(reached)), 1e-6)
        methods = sorted(dict.fromkeys(p.method for p in points), key=lambda name: name not in OURS)
        for i, method in enumerate(methods):
            mine = sorted((p for p in points if p.method == method), key=lambda p: p.kept)
            style = {"linewidth": 2.4, "zorder": 5} if method in OURS else {"linewidth": 1.3}
            colour = _COLOURS[f"series-{i % 8}"]
            label = method if min(p.increase for p in mine) < top else f"{method} (above)"
            axis.plot([100 * p.kept for p in mine], [p.increase for p in mine], "o-", color=colour, label=label,
                      markersize=4.5, **style)  # fmt: skip
        axis.plot([100], [0], "D", color=_COLOURS["ink"], label="dense", zorder=6)
        axis.axvline(100 * kept, color=_COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)), label="this plan's cost")
        axis.set_ylim(min(0.0, *(p.increase for p in points)) - 0.04 * top, 1.08 * top)
        axis.set(xlabel="FLOPs kept, % of the included linears, realised", ylabel="loss increase, nats per token")
        axis.legend()
        return _svg(figure, "Loss increase against the share of FLOPs kept")


def layers_plot(means: Mapping[str, Mapping[int, float]], live: Mapping[str, Mapping[int, Sequence[float]]]) -> str:
    """A panel for each kind of site: FLOPs kept over the layers, the mean, and how it spreads over tokens.

    Args:
        means: {kind: {layer: share}}.
        live: the same with ``QUANTILES`` in the place of the mean, or nothing.
    """
    columns = 2 if len(means) == 4 else min(3, len(means))
    rows = -(-len(means) // columns)
    with _figure(rows, columns, 8.6 / max(columns, 2) * columns, 2.0 * rows + 0.5, sharey=True) as (figure, axes):
        flat = [axis for row in axes for axis in row]
        for axis, (kind, by_layer) in zip(flat, means.items(), strict=False):
            colour = _COLOURS["series-0"]
            spread = sorted(live.get(kind, {}).items())
            if spread:
                layers = [layer for layer, _ in spread]
                bands = [[100 * q[i] for _, q in spread] for i in range(len(QUANTILES))]
                for low, high, alpha in ((0, 4, 0.18), (1, 3, 0.32)):
                    axis.fill_between(layers, bands[low], bands[high], color=colour, alpha=alpha, linewidth=0)
            line = sorted(by_layer.items())
            axis.plot([layer for layer, _ in line], [100 * share for _, share in line], "o-", color=colour,
                      linewidth=1.6, markersize=2.5)  # fmt: skip
            axis.set_title(kind)
            axis.set_ylim(0, 105)
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in flat[len(means) :]:
            axis.set_visible(False)
        figure.supxlabel("layer", fontsize=9, color=_COLOURS["muted"])
        figure.supylabel("FLOPs kept, %", fontsize=9, color=_COLOURS["muted"])
        return _svg(figure, "FLOPs kept over the layers, by kind of site")


def energy_plot(curves: Mapping[str, Sequence[float]]) -> str:
    """How much of its output's energy the largest directions of a site hold."""
    with _figure(1, 1, 7.6, 3.4) as (figure, axes):
        axis = axes[0][0]
        for i, (name, curve) in enumerate(curves.items()):
            share = [100 * (k + 1) / len(curve) for k in range(len(curve))]
            axis.plot(share, [100 * e for e in curve], color=_COLOURS[f"series-{i % 8}"], linewidth=1.6, label=name)
        axis.set(xlabel="directions, % of the rank, largest first", ylabel="energy of the output, %", ylim=(0, 102))
        axis.legend(fontsize=8)
        return _svg(figure, "Energy held by the largest directions of a site's output")


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float, **settings: Any) -> "Iterator[tuple[Any, Any]]":
    """Yields (figure, axes [rows][columns]) in the page's style. Raises RanaError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RanaError("the page's plots need matplotlib: pip install 'rana-compile[report]'") from error
    muted, grid = _COLOURS["muted"], _COLOURS["grid"]
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "rana_compile",  # the same page for the same plan
        "font.size": 9,
        "axes.edgecolor": grid,
        "axes.labelcolor": muted,
        "axes.titlesize": 9.5,
        "axes.titlecolor": _COLOURS["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "legend.frameon": False,
        "legend.labelcolor": _COLOURS["ink"],
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots(rows, columns, squeeze=False, **settings)
        for axis in axes.flat:
            axis.patch.set_visible(False)
        yield figure, axes


def _svg(figure: Any, title: str) -> str:
    """The figure as an ``<svg>`` element whose colours are the page's."""
    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', rf'<svg role="img" aria-label="{title}" \1', text, count=1)
    text = re.sub(r'height="[^"]*pt"', "", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?)'[^\";]*", r"\1var(--font)", text)
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
