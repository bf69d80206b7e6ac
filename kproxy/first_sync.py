"""What is to be done once our rules are in place, and not before."""

from __future__ import annotations

import logging

from kproxy.config import Config
from kproxy.host.run import CommandError
from kproxy.model.delta import Kind
from kproxy.model.store import Changed
from kproxy.model.types import Family
from kproxy.nftables.cleanup import remove_table
from kproxy.preparation import prepare_localhost_node_ports
from kproxy.sync.report import SyncReport

log = logging.getLogger(__name__)


class FirstSync:
    """An observer that acts on each family's first success.

    It removes what nftables mode left behind, and opens 127.0.0.1 to NodePorts, which is guarded by a rule of ours.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._done: set[Family] = set()

    def queued(self, family: Family, now: float) -> None:
        """Do nothing."""

    def changed(self, kind: Kind, changed: Changed) -> None:
        """Do nothing."""

    def synced(self, report: SyncReport) -> None:
        """Act if this is the family's first success."""
        family = report.family
        if report.error or family in self._done:
            return
        self._done.add(family)
        if family is Family.IPV4:
            prepare_localhost_node_ports(self._config)
        try:
            if remove_table(family):
                log.info("%s: removed what nftables mode had left", family.value)
        except CommandError as error:
            log.warning("%s: rules of nftables mode are still there beside ours: %s", family.value, error)
