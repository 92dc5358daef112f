"""The page of a plan: whole, without a network, every site in it, and colours that the page decides."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support import run_cli, tiny_llama, tokens
from torch import nn

import rana_compile
from rana_compile import ConfigError, Plan, RanaError
from rana_compile.page import layer_of, page_of, read_points
from rana_compile.picture import QUANTILES, Observed, Point


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return rana_compile.calibrate(model, tokens(4), 0.6, "auto", exclude=["o_proj"], progress=False)


@pytest.fixture(scope="module")
def observed(model: nn.Module, plan: Plan) -> Observed:
    return rana_compile.observe(model, plan, tokens(3, seed=5))


class Page(HTMLParser):
    """Text and cells of a page; raises on a tag that is closed and was not open."""

    VOID = ("meta", "br", "link", "path", "use")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.titles += [value for name, value in attrs if name == "title" and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


POINTS = [Point("rana", 0.6, 0.2), Point("rana", 0.8, 0.05), Point("WINA <b>", 0.6, 0.4)]


def test_page_holds_every_section_site_and_reason(plan: Plan, observed: Observed) -> None:
    page = Page(page_of(plan, POINTS, observed))
    text = " ".join(page.text)
    assert page.open == []
    for title in (
        "Quality against cost",
        "layer by layer",
        "What a token takes",
        "Energy of the outputs",
        "Left alone",
    ):
        assert title in text
    assert {title.split("\n")[0] for title in page.titles} == {s.site.name for s in plan.sites}
    for entry in plan.skipped:
        assert entry.name in text and entry.reason in text
    assert torch.__version__ in text and "WINA <b>" in text


def test_page_needs_no_network_and_takes_its_colours_from_css(plan: Plan, observed: Observed) -> None:
    text = page_of(plan, POINTS, observed)
    loaded = re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)|url\(([^)]+)\)|@import""", text)
    assert all((a or b).startswith("#") for a, b in loaded)
    assert "<script" not in text
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    assert drawn <= {"#000000", "#ffffff"}  # of clip paths, which are not seen
    used = set(re.findall(r"var\(--([\w-]+)", text))
    assert used - {"share"} <= set(re.findall(r"--([\w-]+):", text))


def test_page_without_points_or_text_leaves_those_sections_out(plan: Plan, tmp_path: Path) -> None:
    plan.report(tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "Quality against cost" not in text and "Energy of the outputs" not in text
    assert "What a token takes" in text
    plan.report(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_observed_shares_agree_with_what_is_measured(model: nn.Module, plan: Plan, observed: Observed) -> None:
    assert observed.tokens == 96 and set(observed.live) == {s.site.name for s in plan.adapted if s.live}
    for shares in observed.live.values():
        assert len(shares) == len(QUANTILES) and list(shares) == sorted(shares) and shares[-1] <= 1.01
    for curve in observed.energy.values():
        assert list(curve) == sorted(curve) and curve[-1] == pytest.approx(1)
    mean = sum(shares[2] for shares in observed.live.values()) / len(observed.live)
    assert mean == pytest.approx(rana_compile.measure_cost(model, plan, tokens(3, seed=5)), abs=0.15)


def test_energy_is_that_of_the_singular_values() -> None:
    from rana_compile.observation import _energy

    outputs = torch.randn(40, 12)
    values = torch.linalg.svdvals(outputs.double()).square()
    expected = (values.cumsum(0) / values.sum()).tolist()
    assert _energy([outputs[:15], outputs[15:]]) == pytest.approx(expected, rel=1e-5)


def test_missing_matplotlib_is_an_error_that_says_what_to_install(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RanaError, match=r"pip install 'rana-compile\[report\]'"):
        plan.report(tmp_path / "plan.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.{gate,up}_proj", (3, "mlp.{gate,up}_proj")),
        ("lm_head", (None, "lm_head")),
        ("0.weight", (0, "weight")),
        ("h.11.attn.c_attn", (11, "attn.c_attn")),
    ],
)
def test_layer_and_kind_of_a_site(name: str, expected: tuple[int | None, str]) -> None:
    assert layer_of(name) == expected


def test_points_of_a_sweep_and_of_a_table(tmp_path: Path) -> None:
    sweep, table = tmp_path / "sweep.json", tmp_path / "quality.csv"
    sweep.write_text(json.dumps({"points": [{"method": "rana", "kept": 0.6, "increase": 0.2, "asked": 0.6}]}))
    table.write_text("method,asked,kept,increase\nWINA,0.6,0.61,0.4\n")
    assert [*read_points(sweep), *read_points(table)] == [Point("rana", 0.6, 0.2), Point("WINA", 0.61, 0.4)]
    for text in ("method,kept,increase\n", "prose", "{}", "method,kept,increase\nWINA,much,0.4\n"):
        table.write_text(text)
        with pytest.raises(ConfigError, match="no points in"):
            read_points(table)


def test_show_writes_the_page(plan: Plan, model: nn.Module, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    points = tmp_path / "quality.csv"
    points.write_text("method,kept,increase\nWINA,0.61,0.4\n")
    assert run_cli("show", tmp_path / "plan", "--html", tmp_path / "page.html", "--points", points) == 0
    assert "WINA" in (tmp_path / "page.html").read_text(encoding="utf-8")
