"""docs/configuration.md names every field and flag, with its default, and warns where the code does."""

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
WARNED = "(warns)"

FLAGS = {flag.option: flag for flag in (*CONFIG_FLAGS, *PORT_FLAGS)}


class Row(Struct, frozen=True):
    """A line of a table; `sets` is empty for fields."""

    name: str
    default: str
    sets: tuple[str, ...]
    status: str
    note: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def code(cell: str) -> str:
    assert cell.startswith("`"), cell
    assert cell.endswith("`"), cell
    return cell.strip("`")


def table(heading: str) -> list[Row]:
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [cells(line) for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = lines
    rows = [row if "Sets" in head else [*row[:2], "", *row[2:]] for row in rows]
    return [
        Row(code(name), code(default), tuple(code(each) for each in sets.split(", ") if each), status, note)
        for name, default, sets, status, note in rows
    ]


FIELD_ROWS = table("Fields of the file")
FLAG_ROWS = table("Flags")


def leaves(section: Struct, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section itself, by its path in the file, with its value."""
    for item in msgspec.structs.fields(type(section)):
        value = getattr(section, item.name)
        path = f"{at}{item.encode_name}"
        if isinstance(value, Struct):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


DEFAULTS = dict(leaves(Config())) | dict(leaves(VModule(), "logging.vmodule[]."))


def shown(value: object) -> str:
    """How the page writes a value: text as it is, everything else as JSON."""
    data = encode(value)
    if isinstance(data, str) and data:
        return data
    return json.dumps(int(data) if isinstance(data, float) and data.is_integer() else data)


def changed(value: object) -> object:
    """Some other value of the same type."""
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
    """Return the section with one of its leaves replaced."""
    first, _, rest = path.partition(".")
    name = next(item.name for item in msgspec.structs.fields(type(section)) if item.encode_name == first)
    inner = with_field(getattr(section, name), rest, value) if rest else value
    return msgspec.structs.replace(section, **{name: inner})


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_flags(parser)
    return parser


def flag_default(option: str) -> str:
    """The default of a flag: that of its fields, or else the parser's."""
    flag = FLAGS.get(option)
    if flag in PORT_FLAGS:
        return shown(DEFAULTS[flag.fields[0]]).rpartition(":")[2]
    if flag and flag.fields:
        defaults = {shown(DEFAULTS[field]) for field in flag.fields}
        assert len(defaults) == 1
        return defaults.pop()
    action = next(action for action in parser()._actions if option in action.option_strings)
    return "false" if action.default is False else '""'


def test_every_field_is_there_once_and_in_order() -> None:
    names = [row.name for row in FIELD_ROWS]
    assert sorted(names) == sorted(DEFAULTS)
    assert names == sorted(names, key=str.lower)


def test_every_flag_is_there_once_and_in_order() -> None:
    names = [row.name for row in FLAG_ROWS]
    shown_options = [action.option_strings[-1] for action in parser()._actions if action.help != argparse.SUPPRESS]
    assert sorted(names) == sorted(shown_options)
    assert names == sorted(names)


@pytest.mark.parametrize("row", FIELD_ROWS, ids=lambda row: row.name)
def test_the_default_of_a_field_is_right(row: Row) -> None:
    assert row.default == shown(DEFAULTS[row.name])


@pytest.mark.parametrize("row", FLAG_ROWS, ids=lambda row: row.name)
def test_the_default_of_a_flag_and_what_it_sets_are_right(row: Row) -> None:
    assert row.default == flag_default(row.name)
    assert row.sets == (FLAGS[row.name].fields if row.name in FLAGS else ())


@pytest.mark.parametrize("row", [*FIELD_ROWS, *FLAG_ROWS], ids=lambda row: row.name)
def test_every_row_has_a_status_and_a_sentence(row: Row) -> None:
    assert row.status in {SUPPORTED, PARTIAL, IGNORED}
    assert row.note.endswith(".")


@pytest.mark.parametrize(
    "row", [row for row in FIELD_ROWS if row.name.startswith("nftables.")], ids=lambda row: row.name
)
def test_settings_of_both_modes_have_the_same_status(row: Row) -> None:
    statuses = {each.name: each.status for each in FIELD_ROWS}
    assert row.status == statuses[row.name.replace("nftables.", "iptables.")]


@pytest.mark.parametrize("row", [row for row in FLAG_ROWS if row.sets], ids=lambda row: row.name)
def test_a_flag_has_the_effect_of_its_field(row: Row) -> None:
    of_field = {each.name: each.status for each in FIELD_ROWS}[row.sets[0]]
    # The file's bindAddress completes other fields of the file; flags have no such effect on each other.
    assert row.status == (IGNORED if row.name == "--bind-address" else of_field)


@pytest.mark.parametrize("row", [row for row in FIELD_ROWS if "[]" not in row.name], ids=lambda row: row.name)
def test_a_field_is_warned_about_where_the_page_says_so(row: Row) -> None:
    config = with_field(Config(), row.name, changed(DEFAULTS[row.name]))
    assert bool(ineffective_settings(config, field_path_text)) == (WARNED in row.note)


@pytest.mark.parametrize("row", [row for row in FLAG_ROWS if row.name in FLAGS], ids=lambda row: row.name)
def test_a_flag_is_warned_about_where_the_page_says_so(row: Row) -> None:
    words = {"bool": "true", "gates": "NoSuchGate=true", "vmodule": "file=1", "list": row.default.strip("[]")}
    value = words.get(FLAGS[row.name].kind, row.default.strip('"'))
    _, warnings = apply_flags(Config(), parser().parse_args([f"{row.name}={value}"]))
    assert bool(warnings) == (WARNED in row.note)
