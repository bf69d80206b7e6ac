"""Delete stale UDP conntrack entries after each successful sync."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Protocol

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.stale_udp_flows import UdpFrontends, accepts_node_ports
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family

log = logging.getLogger(__name__)


class ConntrackTable(Protocol):
    """The UDP conntrack entries of one family, implemented by `kproxy.host.ctnetlink.UdpConntrack`."""

    def clean(self, destinations: Collection[str], is_stale: Callable[[str, str], bool]) -> int:
        """Delete the stale entries of flows to these destinations. Return how many were deleted. Raises `OSError`.

        A destination is `ip:port`, or `:port` for that port on any address. `is_stale` is called with the destination
        of a flow and the source of its replies, both as `ip:port`.
        """


class ConntrackCleanup(Struct, frozen=True):
    """The outcome of one cleanup: deleted entries, duration in seconds, and the error ("" on success)."""

    family: Family
    deleted: int
    seconds: float
    error: str = ""


class ConntrackCleaner:
    """Deletes stale UDP conntrack entries, as a step after a sync.

    It must run before the next sync of the family begins, as an `AfterSyncStep` does: a later sync could add endpoints
    that the cleanup would not know, and the cleanup would delete the flows to them. If entries cannot be deleted, the
    cleanup is retried after the next successful sync of the family. Different families may be cleaned at the same time.
    """

    def __init__(
        self,
        tables: Mapping[Family, ConntrackTable],
        own_addresses: Callable[[Family], Collection[str]],
        *,
        clock: Callable[[], float],
        on_cleanup: Callable[[ConntrackCleanup], None],
    ) -> None:
        """`own_addresses` returns this machine's addresses in a family, or raises `OSError`.

        `clock` returns seconds.
        """
        self._tables = tables
        self._frontends = {family: UdpFrontends() for family in tables}
        self._own_addresses = own_addresses
        self._clock = clock
        self._on_cleanup = on_cleanup
        self._failing: set[Family] = set()

    def clean(self, report: SyncReport) -> None:
        """Delete the entries that a sync made stale, and stale entries that earlier cleanups could not delete."""
        if report.result is None or report.family not in self._tables:
            return
        frontends = self._frontends[report.family]
        frontends.update(report.result.plans, complete=report.result.complete)
        if not frontends.unchecked:
            return
        started = self._clock()
        try:
            deleted = self._clean(frontends, report.result.context)
        except OSError as error:
            cleanup = ConntrackCleanup(report.family, 0, self._clock() - started, error.strerror or str(error))
        else:
            frontends.mark_checked()
            cleanup = ConntrackCleanup(report.family, deleted, self._clock() - started)
        self._log(cleanup)
        self._on_cleanup(cleanup)

    def _clean(self, frontends: UdpFrontends, context: Context) -> int:
        own_addresses = cache(lambda: self._own_addresses(context.family))

        def is_stale(destination: str, source: str) -> bool:
            return frontends.is_stale(
                destination, source, lambda address: accepts_node_ports(context, address, own_addresses)
            )

        return self._tables[context.family].clean(frontends.unchecked, is_stale)

    def _log(self, cleanup: ConntrackCleanup) -> None:
        family = cleanup.family.value
        if cleanup.error:
            level = logging.DEBUG if cleanup.family in self._failing else logging.WARNING
            self._failing.add(cleanup.family)
            log.log(level, "%s: cannot delete stale UDP conntrack entries: %s", family, cleanup.error)
            return
        self._failing.discard(cleanup.family)
        log.debug("%s: deleted %d stale UDP conntrack entries in %.3f s", family, cleanup.deleted, cleanup.seconds)
