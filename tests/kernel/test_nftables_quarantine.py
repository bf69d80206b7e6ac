"""If the real kernel rejects some Services in nftables mode, all others are programmed in the same sync."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink import BatchSocket, NetlinkError, RejectedMessage
from kproxy.host.netlink_message import align
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesBackend, NftablesPrinter
from kproxy.nftables.elements import EndpointElements, SetElement, pack_address
from kproxy.nftables.encode import NftMessage, TransactionEncoder
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, NftTable, TransactionRejectedError
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import FamilySync
from tests.faketable import FakeTable
from tests.inprocess import SingleFamilyProxy
from tests.kernel.test_nftables_commit import dump_table
from tests.kernel.test_nftables_restart import without_comments
from tests.lab.namespace import Namespace
from tests.unit.test_nftables_incremental import (
    SIZES,
    Contexts,
    Damaged,
    Event,
    KernelFails,
    OtherTableChanged,
    TablesProxy,
    family_contexts,
    histories,
    replay,
)
from tests.unit.test_nftables_quarantine import ALWAYS, table_of_ledger

Refuse = Callable[[str, bytes | str], bool]
"""Tells whether the kernel must reject an object: the name of a set and an element's key, or a kind and a name."""
FAMILIES = pytest.mark.parametrize("family", Family)
_NEWSET = nf.NFNL_SUBSYS_NFTABLES << 8 | nf.NFT_MSG_NEWSET
_NEWRULE = nf.NFNL_SUBSYS_NFTABLES << 8 | nf.NFT_MSG_NEWRULE
_INVALID_TYPE = 9


class CorruptingEncoder(TransactionEncoder):
    """Encodes some objects so that the kernel rejects them.

    The value of an element's key gets an invalid type, a set gets keys of size 0, and a rule an unknown expression.
    """

    refuse: Refuse = staticmethod(lambda *_: False)

    def encode(self, transaction: Transaction) -> Iterator[NftMessage]:
        for message in super().encode(transaction):
            yield replace(message, payload=self._corrupted(message))

    def _corrupted(self, message: NftMessage) -> bytes:
        if message.elements:
            return self._corrupted_elements(message)
        if message.type == _NEWSET and self.refuse("set", message.name):
            size = struct.pack("=HH", 8, nf.NFTA_SET_KEY_LEN)
            begin = message.payload.index(size) + len(size)
            return message.payload[:begin] + bytes(4) + message.payload[begin + 4 :]
        if message.type == _NEWRULE and self.refuse("chain", message.name):
            return message.payload.replace(b"immediate\0", b"impossibl\0").replace(b"numgen\0", b"nungem\0")
        return message.payload

    def _corrupted_elements(self, message: NftMessage) -> bytes:
        payload, begin = bytearray(message.payload), message.elements_offset
        for element in _single(message.elements):
            if self.refuse(message.name, element.key):
                # Headers: the list's element, its key, and the key's value.
                struct.pack_into("=H", payload, begin + 4 + 4 + 2, _INVALID_TYPE)
            begin += align(struct.unpack_from("=H", payload, begin)[0])
        return bytes(payload)


def _single(elements: Sequence[SetElement | EndpointElements]) -> Iterator[SetElement]:
    for each in elements:
        yield from each.elements() if isinstance(each, EndpointElements) else (each,)


class CorruptingWriter(NftWriter):
    """Writes the verdicts of some elements as gotos to a base chain, which the kernel rejects."""

    refuse: Refuse = staticmethod(lambda *_: False)

    def added_element(self, set_name: str, element: SetElement) -> str:
        if self.refuse(set_name, element.key) and isinstance(element.value, str):
            element = replace(element, value="filter-input")
        return super().added_element(set_name, element)


class RefusingCommit(NetlinkCommit):
    """Commits over netlink. The kernel rejects some objects. `batches` counts the batches, including rejected ones."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._encoder = CorruptingEncoder(family)
        self.batches = 0

    def refuse(self, refuse: Refuse) -> None:
        self._encoder.refuse = refuse  # type: ignore[attr-defined]

    def _send(self, messages: Sequence[NftMessage], generation: int | None) -> None:
        self.batches += 1
        super()._send(messages, generation)


class SilentCommit(RefusingCommit):
    """Commits over netlink. The error of a rejected transaction does not name any object."""

    def __call__(self, transaction: Transaction, generation: int | None = None, /) -> None:
        try:
            super().__call__(transaction, generation)
        except TransactionRejectedError:
            raise TransactionRejectedError("rejected") from None


class RefusingNftCommit(NftCommit):
    """Commits with nft, which rejects the verdicts of some frontends."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self._writer = CorruptingWriter(family)

    def refuse(self, refuse: Refuse) -> None:
        self._writer.refuse = refuse  # type: ignore[attr-defined]


class CountingTable(NftTable):
    """The kernel's table. Counts how often it is read completely."""

    def __init__(self, family: Family, commit: Commit) -> None:
        super().__init__(family, commit)
        self.snapshots = 0

    def snapshot(self, *, allow_interrupted: bool = False) -> TableSnapshot | None:
        self.snapshots += 1
        return super().snapshot(allow_interrupted=allow_interrupted)


class Proxy(SingleFamilyProxy):
    """One family in nftables mode in a network namespace."""

    def __init__(self, node: Namespace, family: Family, commit: RefusingCommit | RefusingNftCommit) -> None:
        self.node = node
        self.commit = commit
        self.kernel = CountingTable(family, commit)
        self.moments = 0
        self.node_ports = True
        super().__init__(NftablesBackend(self.kernel), Context(family, "node-1"), namespace=node)

    def address(self, number: int) -> str:
        if self.context.family is Family.IPV6:
            return f"fd00:96::{number + 1:x}"
        return f"10.96.{number // 250}.{number % 250 + 1}"

    def put_many(self, count: int, *, endpoints: int = 2) -> Proxy:
        """Create or update Services, with NodePorts if `node_ports` is true."""
        for number in range(count):
            self.put_service(number, endpoints)
        return self

    def put_service(self, number: int, endpoints: int = 2, *, affinity: int = 0) -> None:
        name, family = f"s{number:04}", self.context.family
        prefix = "fd00:1::" if family is Family.IPV6 else "10.244.0."
        port = ServicePort("", 80, "TCP", 30_000 + number if self.node_ports else 0)
        addresses = tuple(Endpoint(f"{prefix}{each}", "node-9") for each in range(1, endpoints + 1))
        self.put(
            Service("ns", name, (self.address(number),), (port,), affinity_seconds=affinity),
            EndpointSlice("ns", name, f"ns/{name}", family, addresses, (EndpointPort("", 8080, "TCP"),)),
        )

    def refuse_services(self, *numbers: int) -> None:
        """Let the kernel reject all elements with the ClusterIPs of these Services."""
        addresses = tuple(pack_address(self.address(number)) for number in numbers)
        self.commit.refuse(lambda _, key: isinstance(key, bytes) and key.startswith(addresses))

    def retry(self) -> dict[str, str]:
        """Sync all changes and all quarantined Services. Return the rejected Services."""
        self.moments += 1
        ((family, sync),) = self.families.items()
        self.results[family] = self.call(lambda: sync.sync(self.store, ALWAYS * self.moments))
        self.check_ledger()
        return dict(self.result.applied.rejected)

    def check_ledger(self) -> None:
        """Check that the table in the kernel is the one in the ledger."""
        assert isinstance(self.backend, NftablesBackend)
        fake = FakeTable(self.context.family)
        fake.table = table_of_ledger(self.backend)
        assert self.call(super(CountingTable, self.kernel).snapshot) == fake.snapshot()
        assert self.call(self.kernel.chain_use_counts) == fake.chain_use_counts()

    def programmed(self) -> set[str]:
        """Return the Services that have verdicts, by their comments."""
        snapshot = self.call(super(CountingTable, self.kernel).snapshot)
        assert snapshot is not None
        return {each.comment for each in snapshot.elements[names.SERVICE_IPS].values()}

    def settle(self, namespaces: Callable[[], Namespace]) -> None:
        """Let the kernel accept everything, and check that the table is that of a first sync, without another read."""
        snapshots = self.kernel.snapshots
        self.commit.refuse(lambda *_: False)
        assert not self.retry()
        assert self.kernel.snapshots == snapshots
        fresh = SingleFamilyProxy(
            NftablesBackend(NftTable(self.context.family, NetlinkCommit(self.context.family))),
            self.context,
            store=self.store,
            namespace=namespaces(),
        ).sync()
        assert fresh.namespace is not None
        dumps = [dump_table(each, self.context.family) for each in (self.node, fresh.namespace)]
        assert without_comments(dumps[0]) == without_comments(dumps[1])


@pytest.fixture(params=list(Family))
def proxy(namespaces: Callable[[], Namespace], request: pytest.FixtureRequest) -> Proxy:
    return Proxy(namespaces(), request.param, RefusingCommit(request.param))


def keys(*numbers: int) -> set[str]:
    return {f"ns/s{number:04}" for number in numbers}


@pytest.mark.parametrize("culprits", [(500,), (0, 1, 2, 3, 400, 998, 999)])
def test_all_other_services_of_a_thousand_are_programmed_at_the_start(
    proxy: Proxy, namespaces: Callable[[], Namespace], culprits: tuple[int, ...]
) -> None:
    proxy.put_many(1_000).refuse_services(*culprits)
    rejected = proxy.retry()
    assert rejected.keys() == keys(*culprits)
    for number in culprits:
        assert rejected[f"ns/s{number:04}"].startswith(
            f"element {proxy.address(number)} . tcp . 80 . 0 of service-endpoints: "
        )
        assert rejected[f"ns/s{number:04}"].endswith("Invalid argument")
    assert len(proxy.programmed()) == 1_000 - len(culprits)
    assert isinstance(proxy.commit, RefusingCommit)
    assert proxy.commit.batches <= 8  # all culprits of a batch are found at once
    proxy.settle(namespaces)


def test_all_other_services_of_a_thousand_are_programmed_later(
    proxy: Proxy, namespaces: Callable[[], Namespace]
) -> None:
    proxy.put_many(1_000).retry()
    proxy.refuse_services(17, 18, 900)
    snapshots = proxy.kernel.snapshots
    assert proxy.put_many(1_000, endpoints=3).retry().keys() == keys(17, 18, 900)
    assert len(proxy.programmed()) == 1_000
    for _ in range(3):
        assert proxy.retry().keys() == keys(17, 18, 900)
    assert proxy.kernel.snapshots == snapshots
    proxy.settle(namespaces)


@FAMILIES
@pytest.mark.parametrize("when", ["start", "later", "restart"])
def test_unnamed_culprits_are_found_by_bisection(
    namespaces: Callable[[], Namespace], family: Family, when: str
) -> None:
    proxy = Proxy(namespaces(), family, SilentCommit(family)).put_many(1_000)
    if when != "start":
        proxy.retry()
    if when == "restart":
        proxy.restart(NftablesBackend(proxy.kernel))
    proxy.refuse_services(333, 700)
    begin = proxy.commit.batches  # type: ignore[union-attr]
    assert proxy.put_many(1_000, endpoints=3).retry() == dict.fromkeys(keys(333, 700), "rejected")
    assert len(proxy.programmed()) == (998 if when == "start" else 1_000)
    # Each attempt is repeated once, with single elements.
    assert proxy.commit.batches - begin < 100  # type: ignore[union-attr]
    proxy.settle(namespaces)


def test_all_other_services_are_programmed_after_a_restart(proxy: Proxy, namespaces: Callable[[], Namespace]) -> None:
    proxy.put_many(100).retry()
    proxy.restart(NftablesBackend(proxy.kernel))
    proxy.refuse_services(3, 4, 5)
    assert proxy.put_many(101, endpoints=9).retry().keys() == keys(3, 4, 5)
    assert len(proxy.programmed()) == 101  # the culprits keep their previous endpoints
    proxy.settle(namespaces)


def test_refused_node_port_is_mapped_to_its_service(proxy: Proxy, namespaces: Callable[[], Namespace]) -> None:
    proxy.commit.refuse(
        lambda name, key: name == names.SERVICE_NODE_PORTS and key[2:6] == struct.pack(">HH", 0, 30_007)
    )
    rejected = proxy.put_many(20).retry()
    assert rejected == {"ns/s0007": "element tcp . 30007 of service-nodeports of ns/s0007: Invalid argument"}
    proxy.settle(namespaces)


@pytest.mark.parametrize("kind", ["set", "chain"])
@pytest.mark.parametrize("when", ["start", "later", "restart"])
def test_refused_affinity_set_or_rule_is_mapped_to_its_service(
    proxy: Proxy, namespaces: Callable[[], Namespace], kind: str, when: str
) -> None:
    proxy.put_many(20)
    if when != "start":
        proxy.retry()
    if when == "restart":
        proxy.restart(NftablesBackend(proxy.kernel))
    proxy.put_service(7, affinity=60)
    proxy.put_service(8, affinity=60)
    proxy.commit.refuse(lambda found, name: found == kind and "ns/s0007" in str(name))
    rejected = proxy.retry()
    assert rejected.keys() == keys(7)
    assert rejected["ns/s0007"].startswith("set affinity-" if kind == "set" else "rule 2 of chain ")
    assert len(proxy.programmed()) == (19 if when == "start" else 20)
    snapshots = proxy.kernel.snapshots
    assert proxy.retry().keys() == keys(7)
    assert proxy.kernel.snapshots == snapshots
    proxy.settle(namespaces)


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_restart_keeps_a_rejected_service_with_chains_of_its_own(
    proxy: Proxy, namespaces: Callable[[], Namespace], policy: str
) -> None:
    """The affinity, the restricted sources, the endpoints on this node and even the current clients."""
    family = proxy.context.family
    v6 = family is Family.IPV6
    cidr = "fd00:244::/60" if v6 else "10.244.0.0/15"
    proxy.context = replace(proxy.context, local_traffic=LocalTraffic(cidr=cidr))
    vip, source = ("2001:db8::1", "2001:db8:2::/47") if v6 else ("192.0.2.1", "198.51.100.0/23")
    ports = (ServicePort("dns", 53, "UDP", 30_053), ServicePort("", 80, "TCP", 30_080))
    sticky = Service(
        "ns", "sticky", (proxy.address(500),), ports, affinity_seconds=60, external_local=policy == "Local"
    )
    sticky = replace(sticky, vips=(vip,), source_ranges=(source,))

    def slice_of(*numbers: int) -> EndpointSlice:
        addresses = tuple(Endpoint(f"{'fd00:244::' if v6 else '10.244.0.'}{each}", "node-1") for each in numbers)
        served = (EndpointPort("dns", 53, "UDP"), EndpointPort("", 8080, "TCP"))
        return EndpointSlice("ns", "sticky", "ns/sticky", family, addresses, served)

    proxy.put_many(5)
    proxy.put(sticky, slice_of(1, 2))
    proxy.retry()
    before = dump_table(proxy.node, family)
    proxy.restart(NftablesBackend(proxy.kernel))
    proxy.put(slice_of(2, 3))
    proxy.commit.refuse(
        lambda found, name: found == "chain" and "ns/sticky" in str(name) and str(name).endswith("3/8080")
    )
    assert proxy.retry().keys() == {"ns/sticky"}
    assert dump_table(proxy.node, family) == before
    proxy.put_service(1, 7)
    assert proxy.retry().keys() == {"ns/sticky"}
    proxy.settle(namespaces)


@FAMILIES
@pytest.mark.parametrize("when", ["start", "later"])
def test_nft_names_the_rejected_services(namespaces: Callable[[], Namespace], family: Family, when: str) -> None:
    proxy = Proxy(namespaces(), family, RefusingNftCommit(family))
    proxy.node_ports = False
    proxy.put_many(31)
    if when == "later":
        # nft 1.0.6 cannot add rules that use an existing map, so the last Service keeps the chains.
        proxy.put_many(30, endpoints=0).retry()
        proxy.put_many(30)
    proxy.refuse_services(5, 29)
    rejected = proxy.retry()
    assert rejected.keys() == keys(5, 29)
    first = f"element {proxy.address(5)} . tcp . 80 of service-ips of ns/s0005: "
    assert rejected["ns/s0005"] == f"{first}Could not process rule: Operation not supported"
    assert len(proxy.programmed()) == 29
    proxy.settle(namespaces)


@pytest.mark.parametrize("what", ["element", "map", "table"])
def test_change_by_another_process_is_repaired_and_rejects_nothing(
    proxy: Proxy, namespaces: Callable[[], Namespace], what: str
) -> None:
    proxy.put_many(5).retry()
    table = f"{table_family(proxy.context.family)} {TABLE}"
    if what == "element":
        key = f"{proxy.address(5)} . tcp . 80"
        proxy.node.run(["nft", f"add element {table} service-ips {{ {key} : drop }}"])
        proxy.put_service(5)
    elif what == "map":
        proxy.put_service(5, affinity=60)
        (name, *_) = affinity_sets(proxy)
        proxy.node.run(["nft", f"add map {table} {name} {{ type ipv4_addr : verdict; }}"])
    else:
        proxy.node.run(["nft", f"delete table {table}"])
        proxy.put_service(5)
    assert not proxy.retry()
    assert proxy.kernel.snapshots == 2
    proxy.settle(namespaces)


def affinity_sets(proxy: Proxy) -> list[str]:
    """Return the names of the affinity sets that the Services in the store need."""
    texts: list[str] = []
    printer = NftablesPrinter(proxy.context.family, texts.append)
    SingleFamilyProxy(printer, proxy.context, store=proxy.store).sync()
    return re.findall(r"set (affinity-\S+)", "".join(texts))


def test_missing_permission_is_a_sync_error(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.put_many(20)
    rejections = [RejectedMessage(index, errno.EPERM, "Operation not permitted") for index in range(30, 40)]
    with monkeypatch.context() as patched:
        patched.setattr(BatchSocket, "_receive_rejections", lambda *_: rejections)
        with pytest.raises(SyncError, match="Operation not permitted"):
            proxy.retry()
    assert not proxy.retry()


@pytest.mark.parametrize("code", [errno.ENOBUFS, errno.ENOMEM])
@pytest.mark.parametrize("batch_frontends", [5, 2_000])
def test_lost_reply_leaves_nothing_behind(
    proxy: Proxy, namespaces: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch, code: int, batch_frontends: int
) -> None:
    """If it is unknown whether a batch was committed, the next sync reads the table and removes what is obsolete."""
    proxy.restart(NftablesBackend(proxy.kernel, batch_frontends=batch_frontends))
    proxy.put_many(30)
    real = BatchSocket._receive_rejections

    def lose(*args: object) -> list[RejectedMessage]:
        real(*args)  # type: ignore[arg-type]
        raise NetlinkError(code, "lost")

    for count in (30, 31):
        with monkeypatch.context() as patched:
            patched.setattr(BatchSocket, "_receive_rejections", lose)
            for _ in range(3):
                proxy.put_service(count, endpoints=count, affinity=count)
                with pytest.raises(SyncError, match="lost"):
                    proxy.retry()
        proxy.delete(Service, f"s{count:04}")
        snapshots = proxy.kernel.snapshots
        assert not proxy.retry()
        assert proxy.kernel.snapshots == snapshots + 1
        proxy.settle(namespaces)


# Any history


def refusals() -> st.SearchStrategy[Refuse]:
    """Kernels that reject some elements and affinity sets, selected by a checksum."""

    def refusing(modulus: int, rest: int) -> Refuse:
        def refuse(name: str, key: bytes | str) -> bool:
            if isinstance(key, str):
                return "/" in key and sum(key.encode()) % modulus == rest
            return name != names.NODE_PORT_IPS and sum(name.encode() + key) % modulus == rest

        return refuse

    return st.builds(refusing, st.integers(3, 40), st.integers(0, 2))


class RealTables(TablesProxy):
    """Both families in a network namespace. After each sync, the ledger is compared with the kernel."""

    node: Namespace

    def try_sync(self) -> None:
        for sync in self.families.values():
            self.node.call(lambda sync=sync: self._check(sync))  # type: ignore[misc]

    def _check(self, sync: FamilySync) -> None:
        backend = sync._backend
        assert isinstance(backend, NftablesBackend)
        with suppress(SyncError):
            sync.sync(self.store)
            table = table_of_ledger(backend)
            fake = FakeTable(sync._make_context(None).family)
            fake.table = table
            assert backend._kernel.snapshot() == fake.snapshot()
            assert backend._kernel.chain_use_counts() == fake.chain_use_counts()

    def restarted(self, batch_frontends: int) -> TablesProxy:
        again = RealTables(self.contexts, batch_frontends=batch_frontends, kernels=self.kernels, store=self.store)
        again.node = self.node
        return again


@settings(deadline=None, max_examples=25)
@given(
    family_contexts(),
    st.lists(st.tuples(refusals(), histories(3)), min_size=1, max_size=2),
    st.sampled_from(SIZES),
)
def test_ledger_equals_the_kernel_after_any_rejection(
    kernel: None, contexts: Contexts, phases: list[tuple[Refuse, list[Event]]], size: int
) -> None:
    node = Namespace("refusing")
    commits = {family: RefusingCommit(family) for family in Family}
    tables = {family: NftTable(family, commits[family]) for family in Family}
    try:
        proxy: TablesProxy = RealTables(contexts, batch_frontends=size, kernels=tables)  # type: ignore[arg-type]  # real tables
        proxy.node = node  # type: ignore[attr-defined]
        for refuse, history in phases:
            for commit in commits.values():
                commit.refuse(refuse)
            skipped = (Damaged, KernelFails, OtherTableChanged)
            proxy = replay(proxy, [each for each in history if not isinstance(each, skipped)])
            proxy.try_sync()
        for family, sync in proxy.families.items():
            commits[family].refuse(lambda *_: False)
            assert not node.call(lambda sync=sync: sync.sync(proxy.store, ALWAYS)).applied.rejected  # type: ignore[misc]
        fresh = proxy.tables_of_fresh_start()
        for family, table in tables.items():
            fake = FakeTable(family)
            fake.table = fresh[family]
            assert node.call(table.snapshot) == fake.snapshot()
            assert node.call(table.chain_use_counts) == fake.chain_use_counts()
    finally:
        node.close()
