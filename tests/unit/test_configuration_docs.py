"""docs/configuration.md lists every field and flag, with the right default, status and note about warnings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from kproxy.config import Config, add_flags, apply_flags
from kproxy.config.decode import encode
from kproxy.config.flag_table import CONFIG_FLAGS, PORT_FLAGS
from kproxy.config.types import FlushSeconds, Quantity, Seconds, VModule
from kproxy.config.validation import ineffective_settings
from kproxy.documents.document import field_path_text

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
SUPPORTED, PARTIAL, IGNORED = "supported", "partial", "ignored"
WARNS = "(warns)"

FLAGS = {flag.option: flag for flag in (*CONFIG_FLAGS, *PORT_FLAGS)}


class Row(Struct, frozen=True):
    """A row of a table. `sets` is the fields that a flag sets; it is empty in rows of fields."""

    name: str
    default: str
    sets: tuple[str, ...]
    status: str
    note: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def code(cell: str) -> str:
    """Return the content of a code span."""
    assert cell.startswith("`"), cell
    assert cell.endswith("`"), cell
    return cell.strip("`")


def table(heading: str) -> list[Row]:
    """Return the rows of the table in a section of the page."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [cells(line) for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = lines
    rows = [row if "Sets" in header else [*row[:2], "", *row[2:]] for row in rows]
    return [
        Row(code(name), code(default), tuple(code(path) for path in sets.split(", ") if path), status, note)
        for name, default, sets, status, note in rows
    ]


FIELD_ROWS = table("Fields of the file")
FLAG_ROWS = table("Flags")


def leaf_fields(section: Struct, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of every field that is not itself a section."""
    for item in msgspec.structs.fields(type(section)):
        value = getattr(section, item.name)
        path = f"{prefix}{item.encode_name}"
        if isinstance(value, Struct):
            yield from leaf_fields(value, f"{path}.")
        else:
            yield path, value


DEFAULTS = dict(leaf_fields(Config())) | dict(leaf_fields(VModule(), "logging.vmodule[]."))


def documented(value: object) -> str:
    """Return a value as the page writes it: strings without quotes, everything else as JSON."""
    data = encode(value)
    if isinstance(data, str) and data:
        return data
    return json.dumps(int(data) if isinstance(data, float) and data.is_integer() else data)


def different(value: object) -> object:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, FlushSeconds | Seconds):
        return type(value)(value + 1)
    if isinstance(value, Quantity):
        return Quantity("64Ki")
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    return ("x",) if isinstance(value, tuple) else {"NoSuchGate": True}


def with_field(section: Struct, path: str, value: object) -> Any:
    """Return a copy of the section with another value of one field."""
    first, _, rest = path.partition(".")
    name = next(item.name for item in msgspec.structs.fields(type(section)) if item.encode_name == first)
    inner = with_field(getattr(section, name), rest, value) if rest else value
    return msgspec.structs.replace(section, **{name: inner})


def flag_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_flags(parser)
    return parser


def flag_default(option: str) -> str:
    """Return the documented default of a flag: that of its fields, or the parser's if it sets none."""
    flag = FLAGS.get(option)
    if flag in PORT_FLAGS:
        return documented(DEFAULTS[flag.fields[0]]).rpartition(":")[2]
    if flag and flag.fields:
        defaults = {documented(DEFAULTS[field]) for field in flag.fields}
        assert len(defaults) == 1
        return defaults.pop()
    action = next(action for action in flag_parser()._actions if option in action.option_strings)
    return "false" if action.default is False else '""'


def test_every_field_is_listed_once_in_alphabetical_order() -> None:
    names = [row.name for row in FIELD_ROWS]
    assert sorted(names) == sorted(DEFAULTS)
    assert names == sorted(names, key=str.lower)


def test_every_flag_is_listed_once_in_alphabetical_order() -> None:
    names = [row.name for row in FLAG_ROWS]
    options = [action.option_strings[-1] for action in flag_parser()._actions if action.help != argparse.SUPPRESS]
    assert sorted(names) == sorted(options)
    assert names == sorted(names)


@pytest.mark.parametrize("row", FIELD_ROWS, ids=lambda row: row.name)
def test_defaults_of_fields(row: Row) -> None:
    assert row.default == documented(DEFAULTS[row.name])


@pytest.mark.parametrize("row", FLAG_ROWS, ids=lambda row: row.name)
def test_defaults_and_fields_of_flags(row: Row) -> None:
    assert row.default == flag_default(row.name)
    assert row.sets == (FLAGS[row.name].fields if row.name in FLAGS else ())


@pytest.mark.parametrize("row", [*FIELD_ROWS, *FLAG_ROWS], ids=lambda row: row.name)
def test_every_row_has_a_status_and_a_note(row: Row) -> None:
    assert row.status in {SUPPORTED, PARTIAL, IGNORED}
    assert row.note.endswith(".")


@pytest.mark.parametrize(
    "row", [row for row in FIELD_ROWS if row.name.startswith("nftables.")], ids=lambda row: row.name
)
def test_settings_of_both_modes_have_the_same_status(row: Row) -> None:
    statuses = {field.name: field.status for field in FIELD_ROWS}
    assert row.status == statuses[row.name.replace("nftables.", "iptables.")]


@pytest.mark.parametrize("row", [row for row in FLAG_ROWS if row.sets], ids=lambda row: row.name)
def test_flag_has_the_status_of_its_field(row: Row) -> None:
    field_status = {field.name: field.status for field in FIELD_ROWS}[row.sets[0]]
    # bindAddress in the file sets the IP family of the file's other addresses. The flag does not affect other flags.
    assert row.status == (IGNORED if row.name == "--bind-address" else field_status)


@pytest.mark.parametrize("row", [row for row in FIELD_ROWS if "[]" not in row.name], ids=lambda row: row.name)
def test_fields_that_cause_warnings_are_marked(row: Row) -> None:
    config = with_field(Config(), row.name, different(DEFAULTS[row.name]))
    assert bool(ineffective_settings(config, field_path_text)) == (WARNS in row.note)


@pytest.mark.parametrize("row", [row for row in FLAG_ROWS if row.name in FLAGS], ids=lambda row: row.name)
def test_flags_that_cause_warnings_are_marked(row: Row) -> None:
    values = {"bool": "true", "gates": "NoSuchGate=true", "vmodule": "file=1", "list": row.default.strip("[]")}
    value = values.get(FLAGS[row.name].kind, row.default.strip('"'))
    _, warnings = apply_flags(Config(), flag_parser().parse_args([f"{row.name}={value}"]))
    assert bool(warnings) == (WARNS in row.note)
