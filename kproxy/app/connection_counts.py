"""Read the connection counters of the proxy mode that programs this node."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from kproxy.app.candidate_families import IPV6_ADDRESSES
from kproxy.config.types import Mode
from kproxy.host.background import BackgroundCall, ThreadStartError
from kproxy.host.process import has_net_admin
from kproxy.iptables.connection_counts import read_connection_counts as read_iptables
from kproxy.model.connection_counts import ConnectionTotals, Counts, CountsUnavailableError, ServicePortName
from kproxy.model.log_throttle import LogThrottle
from kproxy.model.types import Family
from kproxy.nftables.connection_counts import read_connection_counts as read_nftables

log = logging.getLogger(__name__)
SCRAPE_SECONDS = 0.2
"""How long a scrape waits for the counters. The thread that serves it also serves health checks."""


def read_counts(*, endpoints: bool) -> tuple[Mode, Counts]:
    """Return the mode whose rules exist in this network namespace, and the counters of each IP family.

    Without `endpoints`, nftables mode reads only the counters of the frontends. Raises `CountsUnavailableError`.
    """
    if not has_net_admin():
        raise CountsUnavailableError(
            "only root may read the counters: run this command as root (capability CAP_NET_ADMIN in this network "
            "namespace)"
        )
    families = list(Family) if IPV6_ADDRESSES.exists() else [Family.IPV4]
    modes: tuple[Mode, ...] = ("nftables", "iptables")
    for mode in modes:
        if counts := read_counts_of(mode, families, endpoints=endpoints):
            return mode, counts
    raise CountsUnavailableError(
        "this network namespace has no rules of kproxy; run this command on the node, or in the kproxy pod: "
        "kubectl -n kube-system exec ds/kproxy -- kproxy top"
    )


def read_counts_of(mode: Mode, families: Iterable[Family], *, endpoints: bool = False) -> Counts:
    """Return the counters of those IP families whose rules exist. Raises `CountsUnavailableError`."""
    counts = {
        family: read_nftables(family, endpoints=endpoints) if mode == "nftables" else read_iptables(family)
        for family in families
    }
    return {family: each for family, each in counts.items() if each is not None}


class ScrapedConnections:
    """The connections to each service port, for a scrape of the metrics.

    Each call starts to read the counters in another thread, waits for the result for at most `SCRAPE_SECONDS`, and
    returns the newest totals. In a large cluster in iptables mode, where reading takes seconds, these are the totals of
    the previous scrape.
    """

    def __init__(self, limit: int, read: Callable[[], Counts], *, wait: float = SCRAPE_SECONDS) -> None:
        """`read` raises `CountsUnavailableError`. At most `limit` service ports are distinguished."""
        self._read = read
        self._wait = wait
        self._totals = ConnectionTotals(limit)
        self._series: dict[ServicePortName, int] = {}
        self._idle = threading.Event()
        self._idle.set()
        self._reminder = LogThrottle()

    def __call__(self) -> dict[ServicePortName, int]:
        """Return the connections of each service port. Only one thread may call this."""
        if self._idle.is_set():
            self._idle.clear()
            try:
                BackgroundCall(self._update)
            except ThreadStartError as error:
                log.debug("cannot read the connection counters: %s", error)
                self._idle.set()
        self._idle.wait(self._wait)
        return self._series

    def _update(self) -> None:
        try:
            self._totals.update(self._read())
            self._series = self._totals.series()
            self._reminder.reset()
        except CountsUnavailableError as error:
            if self._reminder.is_due(time.monotonic()):
                log.warning("kproxy.serviceConnectionMetrics: %s", error)
        except Exception as error:  # the thread has nobody else to report to
            log.error("kproxy.serviceConnectionMetrics: unexpected %r", error)
            log.debug("kproxy.serviceConnectionMetrics", exc_info=error)
        finally:
            self._idle.set()
