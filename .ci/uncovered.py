"""Errors that no test raises: place and message of each ``raise`` that a coverage run did not reach.

python .ci/uncovered.py out/coverage.json
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path


def uncovered(report: Path) -> Iterator[tuple[str, int, str]]:
    """(file, line, what is raised) of each."""
    files = json.loads(report.read_text(encoding="utf-8"))["files"]
    for name, measured in sorted(files.items()):
        missing = set(measured["missing_lines"])
        tree = ast.parse(Path(name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.lineno in missing:
                yield name, node.lineno, ast.unparse(node)


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"usage: {sys.argv[0]} coverage.json (of: pytest --cov --cov-report=json)")
    found = list(uncovered(Path(sys.argv[1])))
    for name, line, text in found:
        print(f"{name}:{line}: {text if len(text) < 160 else text[:157] + '...'}")
    print(f"{len(found)} raises that no test reaches, in {len({name for name, *_ in found})} files")


if __name__ == "__main__":
    main()
