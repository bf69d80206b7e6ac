"""Reading and writing the table of packets: their fates in iptables mode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from kproxy.model.addresses import family_of
from kproxy.model.types import Family, Protocol

PATH = Path(__file__).with_name("packets.txt")
HEAD = "# Derived from tests/golden by `python -m tests.packets.record`; what it means: __init__.py\n"
_SOCKET = re.compile(r"\[?([0-9a-f.:]+?)\]?:(\d+)")
_REMEMBERING = " remembering "


class Row(NamedTuple):
    """One packet. `fate` is what expectation.describe() says of its outcome."""

    scenario: str
    sender: str
    address: str
    port: int
    protocol: Protocol
    remembering: str = ""
    fate: str = ""

    @property
    def family(self) -> Family:
        return family_of(self.address)

    @property
    def to(self) -> str:
        return f"{socket_text(self.address, self.port)} {self.protocol}"

    @property
    def origin(self) -> str:
        return self.sender + (_REMEMBERING + self.remembering if self.remembering else "")

    def __str__(self) -> str:
        return f"{self.scenario}: {self.origin} -> {self.to}"


def socket_text(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split_socket(text: str) -> tuple[str, int]:
    found = _SOCKET.fullmatch(text)
    assert found, text
    return found[1], int(found[2])


def read_table() -> list[Row]:
    """Return all rows, with their fates in iptables mode."""
    lines = PATH.read_text().splitlines()
    return [read_row(line) for line in lines if line and not line.startswith("#")]


def read_row(line: str) -> Row:
    """Return the row that stands on a line."""
    scenario, origin, to, fate = re.split(r" {2,}", line)
    sender, _, remembering = origin.partition(_REMEMBERING)
    socket, protocol = to.split(" ")
    address, port = split_socket(socket)
    return Row(scenario, sender, address, port, cast("Protocol", protocol), remembering, fate)


def table_text(rows: Iterable[Row]) -> str:
    """Return the table as it stands in its file, with the columns of a scenario below each other."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.scenario, []).append(row)
    return HEAD + "".join("\n" + rows_text(block) for block in found.values())


def rows_text(rows: Sequence[Row]) -> str:
    """Return rows on a line each, with their columns below each other."""
    cells = [(row.scenario, row.origin, row.to, row.fate) for row in rows]
    widths = [max(len(each[column]) for each in cells) for column in range(3)]
    lines = ("  ".join([*(each[n].ljust(widths[n]) for n in range(3)), each[3]]) for each in cells)
    return "".join(line + "\n" for line in lines)
