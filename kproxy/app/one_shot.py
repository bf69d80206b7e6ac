"""The one-shot commands: program the node from files, or only render the rules."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from kproxy.app.backends import check_privileges, local_node_name, make_families, watched_kinds
from kproxy.app.family_contexts import assumed_context
from kproxy.app.first_sync import FirstSyncSteps
from kproxy.config import Config
from kproxy.config.validation import default_mode_warning
from kproxy.host.ctnetlink import UdpConntrack
from kproxy.host.interfaces import own_addresses
from kproxy.iptables.backend import IptablesPrinter
from kproxy.kube.manifests.file_source import FileSource
from kproxy.model.delta import Delta
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncError, SyncReport
from kproxy.model.types import Family
from kproxy.nftables.backend import NftablesPrinter
from kproxy.sync.conntrack_cleanup import ConntrackCleaner
from kproxy.sync.family_sync import Backend, FamilySync
from kproxy.sync.log_summary import synced_text
from kproxy.sync.service_events import ServiceEventListener

log = logging.getLogger(__name__)


def apply(config: Config, objects: str) -> None:
    """Program the node with the objects in a file or directory. Raises `StartError`, `FileSourceError` or `SyncError`.

    If one family fails, the other is still programmed, and if the kernel rejects a Service, all others are. The message
    of `SyncError` has one line for each failed family and for each rejected Service.
    """
    check_privileges()
    store = load_store(config, objects)
    if warning := default_mode_warning(config):
        log.warning("%s", warning)
    families = make_families(config, [])
    tables = {family: UdpConntrack(family) for family in families}
    cleaner = ConntrackCleaner(tables, own_addresses, clock=time.monotonic, on_cleanup=lambda _: None)
    steps = (ServiceEventListener(lambda *_: None).on_sync, cleaner.clean, FirstSyncSteps(config, families).run)
    failures = []
    for family, sync in families.items():
        started = time.monotonic()
        try:
            result = sync.sync(store)
        except SyncError as error:
            failures.append(f"{family.value}: {error}")
        else:
            finished = time.monotonic()
            report = SyncReport(family, started, finished, result)
            for step in steps:
                step(report)
            log.info("%s", synced_text(family, result.services, finished - started, result.counts, complete=True))
            failures += (
                f"{family.value}: the kernel rejected the rules of Service {key}: {reason}"
                for key, reason in sorted(result.applied.rejected.items())
            )
    if failures:
        raise SyncError("\n".join(failures))


def render(config: Config, objects: str) -> dict[Family, str]:
    """Render the rules for the objects in a file or directory, as if the kernel had no rules.

    Returns, for each family, the input for `iptables-restore` in iptables mode, or for `nft -f` in nftables mode.
    They depend only on the configuration, on the objects and on the host name of this machine. Raises
    `FileSourceError`.
    """
    store = load_store(config, objects)
    texts = {}
    for family in Family:
        pages: list[str] = []
        printer = _printer(config, family, pages.append)
        result = FamilySync(printer, partial(assumed_context, config, family, local_node_name(config))).sync(store)
        for transition in result.transitions:
            log.warning("%s", transition.message)
        texts[family] = "".join(pages)
    return texts


def _printer(config: Config, family: Family, show: Callable[[str], object]) -> Backend:
    if config.effective_mode == "nftables":
        return NftablesPrinter(family, show)
    return IptablesPrinter(show, dispatch_threshold=config.kproxy.iptables_dispatch_threshold)


def load_store(config: Config, objects: str, node_name: str = "") -> Store:
    """Load the desired state from a file or directory. Raises `FileSourceError`.

    If `node_name` is not set, it is that of the configuration, and a warning is logged if the files do not contain the
    Node.
    """
    name = node_name or local_node_name(config)
    store = Store(name, watched_kinds(config))

    def apply_all(deltas: tuple[Delta, ...]) -> None:
        for delta in deltas:
            store.apply(delta)

    FileSource(objects, apply_all).load_once()
    if store.node is None and not node_name:
        log.warning("no Node %r: zone, pod CIDRs and node addresses are unknown", name)
    return store
