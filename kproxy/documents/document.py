"""A document of a YAML or JSON file, the path of a field in it, and problems with positions. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct


class DocumentError(ValueError):
    """Text that is neither JSON nor YAML. `line` and `column` count from 1; 0 means unknown."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class Document(Struct, frozen=True):
    """One document: its JSON text, or the data that YAML text stands for.

    `line_of` returns the line (from 1) of the field at a path, or of the last part of the path that exists;
    0 if it cannot be told. `doubled` are the keys that YAML gives more than once in one mapping, if those were asked
    for: the last one counts.
    """

    content: bytes | Any
    line_of: Callable[[FieldPath], int]
    doubled: Sequence[FieldPath] = ()


FieldPath: TypeAlias = tuple[str | int, ...]
"""The keys and indexes that lead to a field."""


def field_path_text(path: FieldPath) -> str:
    """Return a path as `spec.ports[0].port`; a key that is not printable, such as a line break, is quoted."""
    quoted = (step if isinstance(step, int) or step.isprintable() else repr(step) for step in path)
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in quoted).removeprefix(".")


class FileProblem(Struct, frozen=True):
    """What is wrong with a file, as one line. `line` and `column` count from 1; 0 means unknown."""

    path: str
    message: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        place = "".join(f":{number}" for number in (self.line, self.column) if number)
        return f"{self.path}{place}: {self.message}"


MAX_VALUE_LENGTH = 80
"""Characters of a value that an error message quotes."""


def format_value(value: object) -> str:
    """Return a value as JSON for an error message, cut to `MAX_VALUE_LENGTH` characters."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):  # keys that JSON does not allow, lone surrogates, cycles
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."
