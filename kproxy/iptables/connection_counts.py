"""Read how many connections the rules of one family have counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kproxy.host.commands import CommandError, CommandRunner
from kproxy.iptables.rule_counters import connection_counts
from kproxy.iptables.runner import SAVE_SECONDS, program_name
from kproxy.model.connection_counts import ConnectionCounts, CountsUnavailableError
from kproxy.model.types import Family


def read_connection_counts(family: Family, commands: CommandRunner | None = None) -> ConnectionCounts | None:
    """Read the counters of the endpoints with `iptables-save`.

    Return None if table nat has no rules of Services. Raises `CountsUnavailableError` if the rules cannot be read.
    """
    argv = [f"{program_name(family)}-save", "-c", "-t", "nat"]
    try:
        with (commands or CommandRunner()).stream_output(argv, timeout=SAVE_SECONDS) as lines:
            seen = _Seen(lines)
            counts = connection_counts(seen)
    except CommandError as error:
        raise CountsUnavailableError(str(error)) from None
    return counts if seen.services else None


class _Seen:
    """Lines, and whether one of them declares a chain that only Service proxies create."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.services = False

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.services |= line.startswith(":KUBE-SERVICES ")
            yield line
