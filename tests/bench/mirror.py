"""The same decisions as the daemon's, in this process, with everything that the kernel is given kept for a replay.

The replay is the floor: no proxy that wants this state in the kernel can be faster than its bare transactions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import msgspec
from msgspec import Struct

from kproxy.app.backends import watched_kinds
from kproxy.app.contexts import make_context
from kproxy.config import Config
from kproxy.host.netlink import BatchSocket
from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.backend import BLOCK_RULES, IptablesBackend
from kproxy.iptables.base_rules import INVALID_COUNTER
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_page
from kproxy.model.context import Context
from kproxy.model.delta import Delete, Kind, Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceCIDR
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.encode import NFNL_SUBSYS_NFTABLES, TransactionEncoder
from kproxy.nftables.kernel import NftTable
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family import FamilySync
from tests.bench.cluster import CLUSTER_CIDR, Cluster, Object
from tests.bench.cost import spent
from tests.bench.notices import Notices
from tests.lab.iptables import RecordingIptables
from tests.lab.topology import NODE

KINDS: dict[str, Kind] = {each.__name__: each for each in (Service, EndpointSlice, Node, ServiceCIDR)}

NetlinkMessages: TypeAlias = list[tuple[int, int, bytes]]


class Cost(Struct, frozen=True):
    """What a replay took: seconds until the last commit, and CPU seconds, children included."""

    seconds: float
    cpu: float


class IptablesRecorder(RecordingIptables):
    """The real iptables, with every input kept."""

    def replay(self, inputs: Sequence[str]) -> None:
        """Run the bare `iptables-restore` on the inputs."""
        IptablesRunner.restore_each(self, inputs)  # which keeps nothing


class NetlinkRecorder:
    """The real netlink, with every input kept: the messages of each batch."""

    def __init__(self, family: Family) -> None:
        self.inputs: list[NetlinkMessages] = []
        self._encoder = TransactionEncoder(family)
        self._socket = BatchSocket(NFNL_SUBSYS_NFTABLES)

    def __call__(self, change: Transaction, generation: int | None = None, /) -> None:
        """Make a transaction, whatever the generation: replays by this object make it wrong."""
        messages = [(each.kind, each.flags, each.payload) for each in self._encoder.encode(change)]
        self.inputs.append(messages)
        self._socket.commit(messages)

    def replay(self, inputs: Sequence[NetlinkMessages]) -> None:
        """Send each batch as it was and wait until the kernel has taken it."""
        for messages in inputs:
            self._socket.commit(messages)


Recording: TypeAlias = list[tuple[IptablesRecorder, list[str]] | tuple[NetlinkRecorder, list[NetlinkMessages]]]


class Mirror:
    """A second kproxy without API server, daemon and schedule, in the present namespace."""

    def __init__(self, mode: str, cluster: Cluster, *, block_rules: int = BLOCK_RULES) -> None:
        """`block_rules` is for mode iptables: how many rules a transaction of the first sync may hold."""
        config = Config(cluster_cidr=CLUSTER_CIDR, hostname_override=NODE, mode=mode)  # type: ignore[arg-type]
        self._store = Store(NODE, watched_kinds(config))
        found: dict[Kind, list[Object]] = {kind: [] for kind in watched_kinds(config)}
        for each in cluster.objects():
            if KINDS[each["kind"]] in found:
                found[KINDS[each["kind"]]].append(each)
        for kind, bodies in found.items():
            self._store.apply(Replace(kind, tuple(_decoded(kind, bodies))))
        self._recorders: list[IptablesRecorder] | list[NetlinkRecorder]
        if mode == "iptables":
            self._recorders, self._syncs = _iptables(config, block_rules)
        else:
            self._recorders, self._syncs = _nftables(config)

    def change(self, *, put: Sequence[Object] = (), delete: Sequence[Object] = ()) -> Recording:
        """Program a change, or at first everything, and return what the kernel was given for it."""
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
                sync.note(changed)


def rules_of_service(endpoints: int) -> int:
    """Return how many rules mode iptables has in chains of a Service's own, for one port of type ClusterIP."""
    return 1 + 3 * endpoints  # masquerading; for each endpoint one that picks it, and two in a chain of its own


def replay(recording: Recording, notices: Notices) -> Cost:
    """Give the kernel once more what it was given, and measure only that.

    As for the daemon, the end is the last notice: what `iptables-restore` does after its commit is not waited for.
    """
    cpu, began = spent(), time.monotonic_ns()
    for recorder, inputs in recording:
        recorder.replay(inputs)  # type: ignore[arg-type]
    ended = time.monotonic_ns()
    commits = notices.since(began)
    return Cost(((commits[-1].moment if commits else ended) - began) / 1e9, spent() - cpu)


def _decoded(kind: Kind, bodies: Sequence[Object]) -> list[Service | EndpointSlice | Node | ServiceCIDR]:
    page = read_page(kind, msgspec.json.encode({"metadata": {}, "items": bodies}))
    found = [item.object for item in page.items if isinstance(item, DecodedObject)]
    return [each for each in found if each is not None]


def _iptables(config: Config, block_rules: int) -> tuple[list[IptablesRecorder], list[FamilySync]]:
    try:
        ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER))
        accounting = True
    except OSError:
        accounting = False
    random_fully = IptablesRunner(Family.IPV4).version().random_fully
    recorders = [IptablesRecorder(family) for family in Family]
    syncs = [
        FamilySync(
            IptablesBackend(recorder, block_rules=block_rules),
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
