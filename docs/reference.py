"""Write docs/reference.md from docstrings and from the parser of the command line.

python docs/reference.py
"""

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rana_compile
from rana_compile import environment, loading, page, quality, testing, text
from rana_compile.calibration import Session, calibration
from rana_compile.cli.arguments import parser
from rana_compile.config import BackendOptions
from rana_compile.picture import Observed, Point

PAGE = Path(__file__).with_name("reference.md")
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$")
PUBLIC = {
    "rana_compile": [getattr(rana_compile, name) for name in rana_compile.__all__],
    "Options of the backend (`rana_compile.config`)": [BackendOptions],
    "Many plans from one recording (`rana_compile.calibration`)": [calibration, Session],
    "Figures (`rana_compile.quality`, `rana_compile.page`)": [
        quality.measure_quality,
        quality.Quality,
        page.read_points,
        Point,
        Observed,
    ],
    "Models and text (`rana_compile.loading`, `rana_compile.text`)": [
        loading.load_causal,
        text.read_texts,
        text.windows_of,
        environment.environment,
    ],
    "For test suites (`rana_compile.testing`)": [
        testing.assert_sites,
        testing.assert_rewrites,
        testing.assert_graph,
        testing.graphs_of,
        testing.rewritten_graphs,
        testing.graph_text,
        testing.count_compilations,
    ],
}


def main() -> None:
    PAGE.write_text(page_text(), encoding="utf-8")


def page_text() -> str:
    parts = [
        "# Reference",
        "Written by `python docs/reference.py` from docstrings; `tests/test_docs.py` keeps it up to date.",
    ]
    for title, members in PUBLIC.items():
        parts.append(f"## {title}")
        for member in members:
            parts += described(member)
    parts += ["## Command line", *commands()]
    return "\n\n".join(parts) + "\n"


def described(member: Any, owner: str = "") -> Iterator[str]:
    """Heading, signature and docstring of a function or class, then its public methods."""
    name = f"{owner}{member.__name__}"
    yield f"###{'#' if owner else ''} {name}"
    source: Any = inspect.unwrap(member)
    if inspect.isclass(member):
        bases = [b.__name__ for b in member.__bases__ if b is not object]
        yield f"```python\nclass {name}({', '.join(bases)})\n```" if bases else f"```python\nclass {name}\n```"
    else:
        yield f"```python\n{signature(source)}\n```"
    yield markdown(inspect.getdoc(member) or "")
    if inspect.isclass(member) and not issubclass(member, Exception):
        for key, value in vars(member).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not key.startswith("_") and inspect.isfunction(function) and function.__doc__:
                yield from described(function, f"{name}.")
            elif isinstance(value, property) and not key.startswith("_") and value.__doc__:
                yield f"#### {name}.{key}"
                yield markdown(inspect.cleandoc(value.__doc__))


def signature(function: Callable[..., Any]) -> str:
    """As it is written in the source, on one line or one argument a line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    returns = f" -> {ast.unparse(tree.returns)}" if tree.returns else ""
    line = f"{tree.name}({ast.unparse(tree.args)}){returns}"
    if len(line) <= 110:
        return line
    parts = ast.unparse(tree.args).split(", ")
    joined = [parts[0]]
    for part in parts[1:]:  # a comma inside of brackets separates no arguments
        whole = joined[-1].count("[") == joined[-1].count("]") and joined[-1].count("(") == joined[-1].count(")")
        joined = [*joined, part] if whole else [*joined[:-1], f"{joined[-1]}, {part}"]
    return f"{tree.name}(\n    " + ",\n    ".join(joined) + f",\n){returns}"


def markdown(doc: str) -> str:
    """A docstring's sections as lists; names in double backquotes as code."""
    lines: list[str] = []
    inside = ""
    for line in doc.replace("``", "`").split("\n"):
        if found := SECTION.match(line):
            inside = found[1]
            lines += [f"**{inside}**", ""]
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(": ")
            listed = inside != "Returns" and colon
            lines.append(f"- `{name}`: {rest}" if listed else line.strip())
        elif inside and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


def commands() -> Iterator[str]:
    """Every command, its arguments and their help, from the parser."""
    top = parser()
    yield "```text\n" + (top.description or "").strip() + "\n```"
    (choices,) = [a.choices for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    for name, one in choices.items():
        yield f"### rana-compile {name}"
        yield one.description or ""
        yield "\n".join(_argument(action) for action in one._actions if action.dest != "help")


def _argument(action: argparse.Action) -> str:
    values = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else "")
    flag = ", ".join(action.option_strings)
    if flag and not values and action.nargs != 0:
        values = action.dest.upper()
    about = (action.help or "") % vars(action)
    return f"- `{f'{flag} {values}'.strip() or action.dest}`: {about}" if about else f"- `{f'{flag} {values}'.strip()}`"


if __name__ == "__main__":
    main()
