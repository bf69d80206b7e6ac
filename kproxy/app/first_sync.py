"""Steps after the first successful sync: remove rules of other modes, and enable NodePorts on 127.0.0.1."""

from __future__ import annotations

import logging
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

    They remove the rules of the other mode, and set route_localnet so that NodePorts answer on 127.0.0.1, which is safe
    only once kproxy's rule protects that address. If rules cannot be removed, the next successful sync tries again. In
    a large cluster this takes seconds, and the next sync waits: a sync changes tables, and neither could read them
    consistently while the other runs.

    Once every family in use has been synced, the steps remove what kube-proxy's ipvs mode left. It is shared by the
    families: one interface has the addresses of both. The next successful sync tries again, too; but if virtual servers
    cannot be removed, only the next full sync does, because finding all the rest takes long in a large cluster.
    """

    def __init__(self, config: Config, families: Collection[Family]) -> None:
        self._config = config
        self._families = frozenset(families)
        self._begun: set[Family] = set()
        self._done: set[Family] = set()
        self._ipvs_done = self._ipvs_waits = False
        self._ipvs_complaint = ""
        self._complaints: dict[Family, str] = {}

    def run(self, report: SyncReport) -> None:
        """Run the steps that are still to be done, if the sync succeeded."""
        family, result = report.family, report.result
        if result is None:
            return
        if family not in self._done:
            self._act(family)
        elif self._ipvs_waits and not result.complete:
            return
        if self._done == self._families and not self._ipvs_done:
            self._remove_ipvs()

    def _act(self, family: Family) -> None:
        if family not in self._begun and family is Family.IPV4:
            prepare_localhost_node_ports(self._config)
        self._begun.add(family)
        try:
            self._remove(family)
        except CommandError as error:
            self._complain(family, str(error))
        else:
            self._done.add(family)

    def _remove_ipvs(self) -> None:
        try:
            removed = remove_ipvs()
        except CommandError as error:
            self._ipvs_waits = isinstance(error, VirtualServersRemainError)
            if str(error) != self._ipvs_complaint:
                log.warning("what ipvs mode left is still there, and may take traffic of Services: %s", error)
            self._ipvs_complaint = str(error)
            return
        self._ipvs_done = True
        if removed:
            log.info("%s", removed)

    def _remove(self, family: Family) -> None:
        """Remove what the other mode left of a family. Raises `CommandError`."""
        if self._config.effective_mode == "nftables":
            removed = remove_iptables(family)
        else:
            removed = f"removed the nftables table of {family.value}" if remove_table(family) else ""
        if removed:
            log.info("%s", removed)
        # It looks at both families, so once is enough. At the start of iptables mode somebody else looks.
        if self._config.effective_mode == "nftables" and family is Family.IPV4 and (warning := unremovable_chains()):
            log.warning("%s", warning)

    def _complain(self, family: Family, reason: str) -> None:
        # On a busy node it is tried every second: the same warning once is enough.
        if reason != self._complaints.get(family):
            log.warning("%s: rules of other modes are still there beside ours: %s", family.value, reason)
        self._complaints[family] = reason
