"""Parts of objects that are left out because they are of no use. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

FieldPath: TypeAlias = tuple[str | int, ...]
"""The keys and indexes that lead to a field."""

SHOWN = 3
"""How many parts of one object are named on a line: a slice may have a hundred bad endpoints."""


class Remark(NamedTuple):
    """A part of an object that is left out: where it is, and why."""

    field: FieldPath
    text: str


def dotted(path: FieldPath) -> str:
    """Return a path as `spec.ports[0].port`; a key that is not printable, such as a line break, is quoted."""
    quoted = (step if isinstance(step, int) or step.isprintable() else repr(step) for step in path)
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in quoted).removeprefix(".")


def remarks_text(remarks: Sequence[Remark]) -> str:
    """Return what is left out of one object, on a line."""
    parts = [f"{dotted(remark.field)}: {remark.text}" for remark in remarks[:SHOWN]]
    more = len(remarks) - SHOWN
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")
