"""Steps after the first successful sync: remove rules of other modes, and enable NodePorts on 127.0.0.1."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

from kproxy.app.cleanup import VirtualServersRemainError, remove_iptables, remove_ipvs, unremovable_chains
from kproxy.app.kernel_parameters import prepare_localhost_node_ports
from kproxy.config import Config
from kproxy.host.commands import CommandError
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
from kproxy.nftables.kernel import remove_table

log = logging.getLogger(__name__)


class FirstSyncSteps:
    """Steps that follow the first successful sync of each family (`kproxy.model.sync_report.AfterSyncStep`).

    If NodePorts must be reachable on 127.0.0.1, the steps set the sysctl `route_localnet` after the first successful
    sync of IPv4. They do not set it earlier, because the sysctl is safe only while kproxy's rule protects 127.0.0.1
    from the network (CVE-2020-8558).

    For each family, the steps remove the rules of the other proxy mode. If the removal fails, it is retried after the
    next successful sync of the family. In a large cluster, the removal takes several seconds. The removal does not run
    concurrently with a sync, because neither could read the tables consistently while the other is changing them.

    Once this removal has succeeded for every family in use, the steps also remove what kube-proxy's ipvs mode left
    behind. The leftovers of both families are removed together, because one network interface has the addresses of
    both. A failed removal is retried after the next successful sync. If virtual servers remain, it is retried only
    after the next full sync, because the removal starts with a search for all leftovers, which takes a long time in a
    large cluster.
    """

    def __init__(self, config: Config, families: Collection[Family]) -> None:
        self._config = config
        self._families = frozenset(families)
        self._started: set[Family] = set()
        self._done: set[Family] = set()
        self._ipvs_done = self._ipvs_needs_full_sync = False
        self._ipvs_problem = ""
        self._problems: dict[Family, str] = {}
        self._lock = threading.Lock()

    def run(self, report: SyncReport) -> None:
        """Run the remaining steps if the sync succeeded. The steps of one family wait for those of the other."""
        with self._lock:
            self._run(report)

    def _run(self, report: SyncReport) -> None:
        family, result = report.family, report.result
        if result is None:
            return
        if family not in self._done:
            self._run_for(family)
        elif self._ipvs_needs_full_sync and not result.complete:
            return
        if self._done == self._families and not self._ipvs_done:
            self._remove_ipvs()

    def _run_for(self, family: Family) -> None:
        if family not in self._started and family is Family.IPV4:
            prepare_localhost_node_ports(self._config)
        self._started.add(family)
        try:
            self._remove(family)
        except CommandError as error:
            self._warn(family, str(error))
        else:
            self._done.add(family)

    def _remove_ipvs(self) -> None:
        try:
            removed = remove_ipvs()
        except CommandError as error:
            self._ipvs_needs_full_sync = isinstance(error, VirtualServersRemainError)
            if str(error) != self._ipvs_problem:
                log.warning("leftovers of ipvs mode remain and may intercept Service traffic: %s", error)
            self._ipvs_problem = str(error)
            return
        self._ipvs_done = True
        if removed:
            log.info("%s", removed)

    def _remove(self, family: Family) -> None:
        """Remove the rules of the other mode in a family. Raises `CommandError`."""
        if self._config.effective_mode == "nftables":
            removed = remove_iptables(family)
        else:
            removed = f"removed the {family.value} nftables table" if remove_table(family) else ""
        if removed:
            log.info("%s", removed)
        # The check covers both families, so it runs only once. In iptables mode, discover_iptables checks at startup.
        if self._config.effective_mode == "nftables" and family is Family.IPV4 and (warning := unremovable_chains()):
            log.warning("%s", warning)

    def _warn(self, family: Family, reason: str) -> None:
        # A busy node retries every second: log the same reason only once.
        if reason != self._problems.get(family):
            log.warning("%s: cannot remove the rules of the other proxy mode: %s", family.value, reason)
        self._problems[family] = reason
