"""Make the pictures of docs/images: the command line in a terminal, and a plan's page in a browser, light and dark.

    make screenshots

Needs Chromium. The plans are made first (``rana-compile sweep`` on SmolLM2-135M, some ten minutes on two cores); with
``--work`` of an earlier run only the pictures are.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops
from rich.console import Console
from rich.text import Text

from rana_compile.cli import main as rana_compile

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from inputs import write_inputs

IMAGES = Path(__file__).with_name("images")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TALLEST = 4200
LINES = 16  # of the table of a plan, which has one for each site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/screenshots"), help="for the plans, the texts, the page")
    parser.add_argument("--points", type=Path, help="instead of the sweep's: the quality.csv of benchmarks/quality.py")
    settings = parser.parse_args()
    work: Path = settings.work
    model, corpus, other = write_inputs(work)
    budgets = ("--budgets", "0.8", "0.7", "0.6", "0.5", "--exclude", "lm_head")
    if not (work / "sweep.json").exists():
        run("sweep", model, "--text", corpus, "--test-text", other, *budgets, "-o", work)
    plan, page = work / "plan-0.6.safetensors", work / "plan.html"
    run(
        "show",
        plan,
        "--html",
        page,
        "--points",
        settings.points or work / "sweep.json",
        "--model",
        model,
        "--text",
        other,
    )
    IMAGES.mkdir(exist_ok=True)
    shoot(page, IMAGES / "report.png", 1180, dark=False)
    shoot(page, IMAGES / "report-dark.png", 1180, dark=True, most=1000)
    terminal(plan, model, other, IMAGES / "terminal.png", work / "terminal.svg")


def run(*arguments: object) -> str:
    """What a command prints. Raises SystemExit if it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = rana_compile([str(a) for a in arguments])
    if status:
        raise SystemExit(status)
    return out.getvalue()


def terminal(plan: Path, model: Path, other: Path, image: Path, drawing: Path) -> None:
    """Two commands and what they print, as in a terminal."""
    console = Console(record=True, width=122, file=io.StringIO(), color_system="truecolor")
    console.print("[bold green]$[/] rana-compile show plan.safetensors | head -n 16")
    console.print(Text("\n".join(run("show", plan).splitlines()[:LINES])), soft_wrap=True)
    console.print("[bold green]$[/] rana-compile eval smollm2 plan.safetensors --text other.txt")
    console.print(Text(run("eval", model, plan, "--text", other, "--tokens", 2048).rstrip()), soft_wrap=True)
    drawing.write_text(console.export_svg(title="rana-compile"), encoding="utf-8")
    frame = drawing.with_suffix(".html")
    style = "<style>body{margin:12px;background:#fff} svg{display:block;width:100%;height:auto}</style>"
    frame.write_text(
        f"<!doctype html><meta charset=utf-8>{style}{drawing.read_text(encoding='utf-8')}", encoding="utf-8"
    )
    shoot(frame, image, 1180, dark=False)


def shoot(page: Path, image: Path, width: int, dark: bool, most: int = TALLEST) -> None:
    """A page as Chromium shows it, cut where it ends."""
    browser = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("screenshots need Chromium")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        scheme = "--blink-settings=preferredColorScheme=" + ("0" if dark else "1")
        options = (*QUIET, f"--user-data-dir={folder}/profile", scheme, f"--window-size={width},{TALLEST}")
        command = [browser, *options, f"--screenshot={raw}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        picture = Image.open(raw).convert("RGB")
    background = Image.new("RGB", picture.size, picture.getpixel((0, picture.height - 1)))
    box = ImageChops.difference(picture, background).getbbox()
    bottom = min((box[3] if box else picture.height) + 24, most)
    small = picture.crop((0, 0, width, bottom)).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(image, optimize=True)


if __name__ == "__main__":
    main()
