"""After each accepted sync: have the kernel forget UDP flows to endpoints that are no longer any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Protocol

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
from kproxy.model.udp_flows import UdpFrontends, accepts_node_ports

log = logging.getLogger(__name__)


class ConntrackTable(Protocol):
    """The kernel's UDP flows of one family; `kproxy.host.conntrack.UdpConntrack` is the real one."""

    def clean(self, destinations: Collection[str], is_stale: Callable[[str, str], bool]) -> int:
        """Delete the stale ones of the flows to these destinations, return how many; raises `OSError`."""


class ConntrackCleanup(Struct, frozen=True):
    """How one cleaning went: entries deleted, seconds taken, and "" or why something stale may be left."""

    family: Family
    deleted: int
    seconds: float
    error: str = ""


class ConntrackCleaner:
    """An `Observer` that deletes stale UDP flows, in the reconciler's thread.

    It cannot be left to another thread: by the time that one has read the table, a later sync may have
    sent flows to endpoints that it does not know, and it would cut them. What could not be deleted stays to be done
    after the family's next sync.
    """

    def __init__(
        self,
        tables: Mapping[Family, ConntrackTable],
        own_addresses: Callable[[Family], Collection[str]],
        *,
        clock: Callable[[], float],
        tell: Callable[[ConntrackCleanup], None],
    ) -> None:
        """`own_addresses` returns this machine's addresses, `tell` is told of each cleaning, `clock` is in seconds."""
        self._tables = tables
        self._frontends = {family: UdpFrontends() for family in tables}
        self._own_addresses = own_addresses
        self._clock = clock
        self._tell = tell
        self._warned: set[Family] = set()

    def clean(self, report: SyncReport) -> None:
        """Delete the entries that a sync made stale, and those that earlier attempts could not delete."""
        if report.result is None or report.family not in self._tables:
            return
        frontends = self._frontends[report.family]
        frontends.update(report.result.plans, complete=report.result.complete)
        if not frontends.unchecked:
            return
        began = self._clock()
        try:
            deleted = self._clean(frontends, report.result.context)
        except OSError as error:
            cleaning = ConntrackCleanup(report.family, 0, self._clock() - began, error.strerror or str(error))
        else:
            frontends.mark_checked()
            cleaning = ConntrackCleanup(report.family, deleted, self._clock() - began)
        self._log(cleaning)
        self._tell(cleaning)

    def _clean(self, frontends: UdpFrontends, context: Context) -> int:
        own_addresses = cache(lambda: self._own_addresses(context.family))

        def is_stale(destination: str, source: str) -> bool:
            return frontends.is_stale(
                destination, source, lambda address: accepts_node_ports(context, address, own_addresses)
            )

        return self._tables[context.family].clean(frontends.unchecked, is_stale)

    def _log(self, cleaning: ConntrackCleanup) -> None:
        name = cleaning.family.value
        if cleaning.error:
            level = logging.DEBUG if cleaning.family in self._warned else logging.WARNING
            self._warned.add(cleaning.family)
            log.log(level, "%s: UDP flows to removed endpoints may live on: conntrack: %s", name, cleaning.error)
            return
        self._warned.discard(cleaning.family)
        log.debug("%s: %d stale UDP flows deleted in %.3f s", name, cleaning.deleted, cleaning.seconds)
