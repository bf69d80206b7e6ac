"""Steps after the first successful sync: remove rules of other modes, and enable NodePorts on 127.0.0.1."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection

from kproxy.app.cleanup import VirtualServersRemainError, remove_iptables, remove_ipvs, unremovable_chains
from kproxy.app.kernel_parameters import prepare_localhost_node_ports
from kproxy.config import Config
from kproxy.host.commands import CommandError
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
from kproxy.nftables.kernel import remove_table

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 10.0
"""Minimum number of seconds before a failed removal is tried again. They double with each further failure."""
MAX_RETRY_SECONDS = 600.0
"""Maximum number of seconds before a failed removal is tried again."""
RETRY_FACTOR = 10
"""The time before a removal is tried again is at least this many times the time that the failed attempt took.

A program that hangs blocks the syncs of its family until it is killed.
"""


class Retry:
    """When to try again what has failed. Times are in seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._at = -math.inf
        self._delay = 0.0

    def is_due(self, now: float) -> bool:
        """Return whether to try now."""
        return now >= self._at

    def failed(self, started: float, now: float) -> None:
        """Record that an attempt failed."""
        self._delay = min(max(FIRST_RETRY_SECONDS, 2 * self._delay, RETRY_FACTOR * (now - started)), MAX_RETRY_SECONDS)
        self._at = now + self._delay


class FirstSyncSteps:
    """Steps that follow the first successful sync of each family (`kproxy.model.sync_report.AfterSyncStep`).

    If NodePorts must be reachable on 127.0.0.1, the steps set the sysctl `route_localnet` after the first successful
    sync of IPv4. They do not set it earlier, because the sysctl is safe only while kproxy's rule protects 127.0.0.1
    from the network (CVE-2020-8558).

    For each family, the steps remove the rules of the other proxy mode. In a large cluster, the removal takes several
    seconds. It does not run concurrently with a sync of the same family, because neither could read the tables
    consistently while the other is changing them. If the removal fails, it is retried after a successful sync of the
    family, with growing pauses between the attempts.

    Once this removal has succeeded for every family in use, the steps also remove what kube-proxy's ipvs mode left
    behind. The leftovers of both families are removed together, because one network interface has the addresses of
    both. A failed removal is retried in the same way. If virtual servers remain, it is retried only after the next full
    sync, because the removal starts with a search for all leftovers, which takes a long time in a large cluster.

    The steps of the families run in different threads, and none waits for another: a program that hangs delays only the
    family whose step runs it.
    """

    def __init__(
        self, config: Config, families: Collection[Family], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` returns seconds of a monotonic clock."""
        self._config = config
        self._families = frozenset(families)
        self._clock = clock
        self._programs = {family: IptablesRunner(family) for family in Family}
        self._stopped = False
        self._started: set[Family] = set()
        self._retries = {family: Retry() for family in self._families}
        self._problems: dict[Family, str] = {}
        self._lock = threading.Lock()
        """Protects `_done` and `_removes_ipvs`. It is never held while a program runs."""
        self._done: set[Family] = set()
        self._removes_ipvs = False
        self._ipvs_done = self._ipvs_needs_full_sync = False
        self._ipvs_problem = ""
        self._ipvs_retry = Retry()

    def run(self, report: SyncReport) -> None:
        """Run the remaining steps if the sync succeeded."""
        family, result = report.family, report.result
        if result is None or self._stopped:
            return
        if family not in self._done:
            self._run_for(family)
        elif self._ipvs_needs_full_sync and not result.complete:
            return
        if self._begin_ipvs():
            try:
                self._remove_ipvs()
            finally:
                self._removes_ipvs = False

    def stop(self) -> None:
        """Kill the programs that are running, and do not start any more. Any thread may call this."""
        self._stopped = True
        for iptables in self._programs.values():
            iptables.stop()

    def _run_for(self, family: Family) -> None:
        if family not in self._started and family is Family.IPV4:
            prepare_localhost_node_ports(self._config)
        self._started.add(family)
        started = self._clock()
        if not self._retries[family].is_due(started):
            return
        try:
            self._remove(family)
        except CommandError as error:
            self._retries[family].failed(started, self._clock())
            self._warn(family, str(error))
        else:
            with self._lock:
                self._done.add(family)

    def _begin_ipvs(self) -> bool:
        """Return whether to remove the leftovers of ipvs mode now. The caller resets `_removes_ipvs` afterwards."""
        with self._lock:
            if self._done != self._families or self._ipvs_done or self._removes_ipvs:
                return False
            self._removes_ipvs = self._ipvs_retry.is_due(self._clock())
            return self._removes_ipvs

    def _remove_ipvs(self) -> None:
        started = self._clock()
        try:
            removed = remove_ipvs(self._programs)
        except CommandError as error:
            self._ipvs_needs_full_sync = isinstance(error, VirtualServersRemainError)
            if not self._ipvs_needs_full_sync:
                self._ipvs_retry.failed(started, self._clock())
            if str(error) != self._ipvs_problem and not self._stopped:
                log.warning("leftovers of ipvs mode remain and may intercept Service traffic: %s", error)
            self._ipvs_problem = str(error)
            return
        self._ipvs_done = True
        if removed:
            log.info("%s", removed)

    def _remove(self, family: Family) -> None:
        """Remove the rules of the other mode in a family. Raises `CommandError`."""
        if self._config.effective_mode == "nftables":
            removed = remove_iptables(family, self._programs[family])
        else:
            removed = f"removed the {family.value} nftables table" if remove_table(family) else ""
        if removed:
            log.info("%s", removed)
        # The check covers both families, so it runs only once. In iptables mode, discover_iptables checks at startup.
        if self._config.effective_mode == "nftables" and family is Family.IPV4:
            warning = unremovable_chains(self._programs[family])
            if warning:
                log.warning("%s", warning)

    def _warn(self, family: Family, reason: str) -> None:
        if reason != self._problems.get(family) and not self._stopped:
            log.warning("%s: cannot remove the rules of the other proxy mode: %s", family.value, reason)
        self._problems[family] = reason
