"""Record what kproxy sends to the kernel, and replay it without kproxy.

A replay is a lower bound: no proxy that creates the same kernel state by the same means can be faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import msgspec
from msgspec import Struct

from kproxy.app.family_contexts import make_context
from kproxy.app.node_settings import watched_kinds
from kproxy.config import Config
from kproxy.host.netlink import BatchSocket
from kproxy.host.nf_tables_constants import NFNL_SUBSYS_NFTABLES
from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import INVALID_COUNTER, LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner
from kproxy.iptables.save_restore import MAX_TRANSACTION_RULES
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_page
from kproxy.model.context import Context
from kproxy.model.delta import Delete, Kind, Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceCIDR
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.encode import TransactionEncoder
from kproxy.nftables.kernel import NftTable
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import FamilySync
from tests.bench.cluster import CLUSTER_CIDR, Cluster, Object
from tests.bench.commit_monitor import CommitMonitor
from tests.bench.usage import self_cpu_seconds
from tests.lab.iptables import RecordingIptables
from tests.lab.topology import NODE

KINDS: dict[str, Kind] = {each.__name__: each for each in (Service, EndpointSlice, Node, ServiceCIDR)}

NetlinkMessages: TypeAlias = list[tuple[int, int, bytes]]


class Cost(Struct, frozen=True):
    """The cost of a replay: seconds until the last commit, and CPU seconds including child processes."""

    seconds: float
    cpu: float


class IptablesRecorder(RecordingIptables):
    """Runs the real iptables and records every input."""

    def replay(self, inputs: Sequence[str]) -> None:
        """Pass the inputs to `iptables-restore`."""
        IptablesRunner.restore_each(self, inputs)  # the overridden method, which records nothing


class NetlinkRecorder:
    """Uses the real netlink and records the messages of each batch."""

    def __init__(self, family: Family) -> None:
        self.inputs: list[NetlinkMessages] = []
        self._encoder = TransactionEncoder(family)
        self._socket = BatchSocket(NFNL_SUBSYS_NFTABLES)

    def __call__(self, change: Transaction, generation: int | None = None, /) -> None:
        """Commit a transaction. The generation is ignored, because replays advance it."""
        messages = [(each.type, each.flags, each.payload) for each in self._encoder.encode(change)]
        self.inputs.append(messages)
        self._socket.commit(messages)

    def replay(self, inputs: Sequence[NetlinkMessages]) -> None:
        """Send each batch unchanged and wait until the kernel has committed it."""
        for messages in inputs:
            self._socket.commit(messages)


Recording: TypeAlias = list[tuple[IptablesRecorder, list[str]] | tuple[NetlinkRecorder, list[NetlinkMessages]]]


class RecordingProxy:
    """kproxy's sync in this process and network namespace, without an API server, a daemon and a schedule."""

    def __init__(self, mode: str, cluster: Cluster, *, max_transaction_rules: int = MAX_TRANSACTION_RULES) -> None:
        """`max_transaction_rules` limits the rules per transaction of the first sync, in iptables mode."""
        config = Config(cluster_cidr=CLUSTER_CIDR, hostname_override=NODE, mode=mode)  # type: ignore[arg-type]
        self._store = Store(NODE, watched_kinds(config))
        by_kind: dict[Kind, list[Object]] = {kind: [] for kind in watched_kinds(config)}
        for each in cluster.objects():
            if KINDS[each["kind"]] in by_kind:
                by_kind[KINDS[each["kind"]]].append(each)
        for kind, bodies in by_kind.items():
            self._store.apply(Replace(kind, tuple(_decoded(kind, bodies))))
        self._recorders: list[IptablesRecorder] | list[NetlinkRecorder]
        if mode == "iptables":
            self._recorders, self._syncs = _iptables(config, max_transaction_rules)
        else:
            self._recorders, self._syncs = _nftables(config)

    def change(self, *, put: Sequence[Object] = (), delete: Sequence[Object] = ()) -> Recording:
        """Program a change and return what was sent to the kernel. The first call programs the whole cluster."""
        for body in put:
            kind = KINDS[body["kind"]]
            self._apply(*(Upsert(each) for each in _decoded(kind, [body])))
        for body in delete:
            metadata = body["metadata"]
            self._apply(Delete(KINDS[body["kind"]], metadata["namespace"], metadata["name"]))
        for recorder in self._recorders:
            recorder.inputs = []
        for sync in self._syncs:
            sync.sync(self._store)
        return [(recorder, recorder.inputs) for recorder in self._recorders]  # type: ignore[misc]

    def _apply(self, *deltas: Upsert | Delete) -> None:
        for delta in deltas:
            changed = self._store.apply(delta)
            for sync in self._syncs:
                sync.add_changes(changed)


def rules_per_service(endpoints: int) -> int:
    """Return the number of rules in the per-Service chains of a ClusterIP Service with one port, in iptables mode."""
    return 1 + 3 * endpoints  # one for masquerading; per endpoint, one that selects it and two in its own chain


def replay(recording: Recording, monitor: CommitMonitor) -> Cost:
    """Send a recording to the kernel again and measure only that.

    As for the daemon, the last notification ends the measurement, so the exit of `iptables-restore` does not count.
    """
    cpu, start = self_cpu_seconds(), time.monotonic_ns()
    for recorder, inputs in recording:
        recorder.replay(inputs)  # type: ignore[arg-type]
    end = time.monotonic_ns()
    commits = monitor.since(start)
    return Cost(((commits[-1].time if commits else end) - start) / 1e9, self_cpu_seconds() - cpu)


def _decoded(kind: Kind, bodies: Sequence[Object]) -> list[Service | EndpointSlice | Node | ServiceCIDR]:
    page = read_page(kind, msgspec.json.encode({"metadata": {}, "items": bodies}))
    decoded = [item.object for item in page.items if isinstance(item, DecodedObject)]
    return [each for each in decoded if each is not None]


def _iptables(config: Config, max_transaction_rules: int) -> tuple[list[IptablesRecorder], list[FamilySync]]:
    try:
        ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER))
        accounting = True
    except OSError:
        accounting = False
    random_fully = IptablesRunner(Family.IPV4).version().random_fully
    recorders = [IptablesRecorder(family) for family in Family]
    syncs = [
        FamilySync(
            IptablesBackend(recorder, max_transaction_rules=max_transaction_rules),
            partial(_context, config, family, accounting=accounting, random_fully=random_fully),
        )
        for family, recorder in zip(Family, recorders, strict=True)
    ]
    return recorders, syncs


def _nftables(config: Config) -> tuple[list[NetlinkRecorder], list[FamilySync]]:
    recorders = [NetlinkRecorder(family) for family in Family]
    syncs = [
        FamilySync(
            NftablesBackend(NftTable(family, recorder)),
            partial(_context, config, family, accounting=False, random_fully=True),
            large_cluster_endpoints=math.inf,
        )
        for family, recorder in zip(Family, recorders, strict=True)
    ]
    return recorders, syncs


def _context(config: Config, family: Family, node: Node | None, *, accounting: bool, random_fully: bool) -> Context:
    return make_context(config, family, NODE, node, (), accounting=accounting, random_fully=random_fully)
