"""The content of an iptables-legacy table changes with each rule, but not with packet counters."""

from __future__ import annotations

import socket

import pytest

from kproxy.host.x_tables import TableInfoSocket
from kproxy.model.types import Family
from tests.lab.iptables import PREFIXES, missing_variant
from tests.lab.namespace import Namespace

MAX_SIZE = 1 << 20
ADDRESSES = {Family.IPV4: ("127.0.0.1", "192.0.2."), Family.IPV6: ("::1", "2001:db8::")}


class LegacyTables:
    """The tables of one family of iptables-legacy."""

    def __init__(self, namespace: Namespace, family: Family) -> None:
        self._namespace = namespace
        self._program = f"{PREFIXES[family]}-legacy"
        self._socket = namespace.call(lambda: TableInfoSocket(family))
        self._family = family
        self.loopback, self.network = ADDRESSES[family]

    def run(self, *arguments: str) -> None:
        """Change table filter."""
        self._namespace.run([self._program, "-w", "5", *arguments])

    def content(self, max_size: int = MAX_SIZE) -> bytes | None:
        """Return the content of table filter."""
        return self._socket.content("filter", max_size)

    def layout(self) -> bytes:
        """Return the layout of table filter."""
        return self._socket.layout("filter")

    def has_counted(self) -> bool:
        """Send a packet over loopback, and return whether a rule counted it."""
        family = socket.AF_INET if self._family is Family.IPV4 else socket.AF_INET6
        with self._namespace.socket(family, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"packet", (self.loopback, 9))
        return "-c 0 0" not in self._namespace.run([self._program, "-v", "-S", "OUTPUT", "1"]).stdout


@pytest.fixture(params=Family)
def tables(namespace: Namespace, request: pytest.FixtureRequest) -> LegacyTables:
    """The tables of each family."""
    if reason := missing_variant("legacy", namespace):
        pytest.skip(reason)
    namespace.run(["ip", "link", "set", "lo", "up"])
    return LegacyTables(namespace, request.param)


def test_content_does_not_depend_on_packets(tables: LegacyTables) -> None:
    tables.run("-A", "OUTPUT", "-m", "comment", "--comment", "counts")
    tables.run("-A", "OUTPUT", "-p", "udp", "--dport", "9", "-j", "ACCEPT")
    before = tables.content()
    assert before is not None
    assert tables.has_counted()
    assert tables.content() == before


def test_each_replacement_of_the_same_size_changes_the_content(tables: LegacyTables) -> None:
    for number in range(3):
        tables.run("-A", "OUTPUT", "-d", f"{tables.network}{number}", "-j", "DROP")
    tables.run("-N", "ONE")
    layout, seen = tables.layout(), [tables.content()]
    tables.run("-R", "OUTPUT", "2", "-d", f"{tables.network}9", "-j", "DROP")
    seen.append(tables.content())
    tables.run("-R", "OUTPUT", "2", "-d", f"{tables.network}9", "-j", "ACCEPT")
    seen.append(tables.content())
    tables.run("-E", "ONE", "TWO")
    seen.append(tables.content())
    assert tables.layout() == layout
    assert len(set(seen)) == len(seen)


def test_table_above_the_maximum_size_is_not_read(tables: LegacyTables) -> None:
    assert tables.content(100) is None
