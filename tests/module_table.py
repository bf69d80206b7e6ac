"""Generate the table of modules in kproxy/README.md from the first line of each module's docstring.

`python -m tests.module_table` writes it. tests/unit/test_docs.py fails if the table is out of date.
"""

from __future__ import annotations

import ast
from pathlib import Path

import kproxy

PACKAGE = Path(kproxy.__file__).parent
PAGE = PACKAGE / "README.md"
BEGIN, END = "<!-- modules: python -m tests.module_table -->\n", "<!-- end of modules -->\n"


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring without its final period."""
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, f"{path} has no docstring"
    return doc.splitlines()[0].removesuffix(".").removesuffix(". Pure")


def table() -> str:
    """Return a section per package, with a table that has a row per module."""
    parts = []
    for package in sorted({path.parent for path in PACKAGE.rglob("*.py")}):
        name = package.relative_to(PACKAGE.parent if package == PACKAGE else PACKAGE)
        rows = [
            f"| `{path.relative_to(PACKAGE)}` | {first_line(path)} |"
            for path in sorted(package.glob("*.py"))
            if path.name != "__init__.py"
        ]
        parts.append(f"### `{name}/`\n\n{first_line(package / '__init__.py')}.\n")
        if rows:
            parts.append("\n".join(["| module | |", "| --- | --- |", *rows]) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def updated(page: str) -> str:
    """Return the page with a current table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
