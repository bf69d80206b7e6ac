"""Documents in YAML and JSON files, field paths, and file problems with line numbers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from kproxy.model.printable_text import printable

FieldPath: TypeAlias = tuple[str | int, ...]
"""The keys and indexes that lead to a field."""


class DocumentError(ValueError):
    """The text is not valid: malformed, not UTF-8, nested too deeply, or containing a duplicate key.

    `line` and `column` are 1-based; 0 means unknown.
    """

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class Document(Struct, frozen=True):
    """One document. `content` is JSON text as `bytes`, or the data parsed from YAML.

    `line_of` returns the 1-based line number of the field at a path. If the field does not exist, `line_of` returns the
    line of its nearest existing ancestor; 0 means unknown. `duplicate_keys` are the paths of keys that occur more than
    once in a YAML mapping, if the caller allowed duplicate keys. `content` has the last value of each duplicate key.
    """

    content: bytes | Any
    line_of: Callable[[FieldPath], int]
    duplicate_keys: Sequence[FieldPath] = ()


class FileProblem(Struct, frozen=True):
    """A problem with a file, described in one line. `line` and `column` are 1-based; 0 means unknown."""

    path: str
    message: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        position = "".join(f":{number}" for number in (self.line, self.column) if number)
        return f"{printable(self.path)}{position}: {self.message}"


def field_path_text(path: FieldPath) -> str:
    """Format a path as `spec.ports[0].port`. Quote unprintable keys, and cut long ones."""
    quoted = (step if isinstance(step, int) or _is_plain(step) else format_value(step) for step in path)
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in quoted).removeprefix(".")


def _is_plain(key: str) -> bool:
    return key.isprintable() and len(key) <= MAX_VALUE_LENGTH


MAX_VALUE_LENGTH = 80
"""Maximum length of a value in an error message, in characters."""


def format_value(value: object) -> str:
    """Format a value as printable JSON for an error message, truncated to `MAX_VALUE_LENGTH` characters."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):  # keys that JSON does not allow, lone surrogates, cycles
        text = f"a {type(value).__name__}"
    text = printable(text[: MAX_VALUE_LENGTH + 1])
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."
