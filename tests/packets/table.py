"""Read and write the table of packets with their fates in iptables mode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from kproxy.model.addresses import family_of
from kproxy.model.types import Family, Protocol

PATH = Path(__file__).with_name("packets.txt")
HEADER = "# Generated from tests/golden by `python -m tests.packets.record`; see __init__.py for the format\n"
_SOCKET = re.compile(r"\[?([0-9a-f.:]+?)\]?:(\d+)")
_REMEMBERING = " remembering "


class Row(NamedTuple):
    """One packet. `fate` is its outcome in the notation of `expectation.describe`."""

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
    match = _SOCKET.fullmatch(text)
    assert match, text
    return match[1], int(match[2])


def read_table() -> list[Row]:
    """Read all rows, with their fates in iptables mode."""
    lines = PATH.read_text().splitlines()
    return [read_row(line) for line in lines if line and not line.startswith("#")]


def read_row(line: str) -> Row:
    """Parse one line."""
    scenario, origin, to, fate = re.split(r" {2,}", line)
    sender, _, remembering = origin.partition(_REMEMBERING)
    socket, protocol = to.split(" ")
    address, port = split_socket(socket)
    return Row(scenario, sender, address, port, cast("Protocol", protocol), remembering, fate)


def table_text(rows: Iterable[Row]) -> str:
    """Format the table for its file. The columns of each scenario are aligned."""
    by_scenario: dict[str, list[Row]] = {}
    for row in rows:
        by_scenario.setdefault(row.scenario, []).append(row)
    return HEADER + "".join("\n" + rows_text(block) for block in by_scenario.values())


def rows_text(rows: Sequence[Row]) -> str:
    """Format rows, one per line, with aligned columns."""
    cells = [(row.scenario, row.origin, row.to, row.fate) for row in rows]
    widths = [max(len(each[column]) for each in cells) for column in range(3)]
    lines = ("  ".join([*(each[n].ljust(widths[n]) for n in range(3)), each[3]]) for each in cells)
    return "".join(line + "\n" for line in lines)
