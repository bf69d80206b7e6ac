"""Netlink messages, the program nft and the rendered text produce identical tables in the kernel."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

import pytest
from msgspec import Struct
from msgspec.structs import replace

from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkSocket
from kproxy.host.netlink_message import attributes, nfgenmsg
from kproxy.model.addresses import socket_text
from kproxy.model.context import Context
from kproxy.model.delta import BASIC_KINDS, Replace
from kproxy.model.store import Store
from kproxy.model.types import Family, ServiceCIDR
from kproxy.nftables import names
from kproxy.nftables import ruleset as nft
from kproxy.nftables.backend import NftablesBackend, NftablesPrinter
from kproxy.nftables.base_table import COUNTED_MAPS, NODE_PORT_KEY, SERVICE_KEY, SETS, base_chains
from kproxy.nftables.elements import (
    DROP,
    PROTOCOLS,
    SetElement,
    address_family,
    endpoint_elements,
    node_port_key,
    pack_address,
    pack_endpoints,
    set_layout,
)
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, NftTable
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.ruleset import KeyField, rule
from kproxy.nftables.transaction import Transaction
from kproxy.simulate.nftables import NftablesSimulator
from kproxy.sync.family_sync import Backend
from tests.inprocess import SingleFamilyProxy
from tests.lab.namespace import Namespace
from tests.recordings import SCENARIOS, config, replaces
from tests.unit.test_iptables_render import OWN, recorded_context

CIDRS = ("10.96.0.0/12", "fd00:10:96::/108")
_NFTABLES = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = 1, 4, 7, 10, 13
_HANDLES = {"table": 4, "chains": 2, "rules": 3, "sets": 16}
_POSITION = 6
_EXPIRATION = 5
_SET_USERDATA = 13
_KEY_TYPEOF, _DATA_TYPEOF = 3, 4

PRIORITIES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}

Attributes = tuple[tuple[int, bytes], ...]


class TableDump(Struct, frozen=True):
    """The kernel's dump of one table, without handles, the order of objects and expirations.

    It omits the type annotations in the user data of sets, which depend on nft's version: 1.1 writes more than 1.0.
    Whether nft understands kproxy's annotations shows in its listing.
    """

    table: Attributes
    sets: dict[bytes, Attributes]
    chains: dict[bytes, Attributes]
    rules: dict[bytes, list[Attributes]]
    elements: dict[bytes, frozenset[Attributes]]


def dump_table(namespace: Namespace, family: Family, table: str = TABLE) -> TableDump:
    """Dump a table in a namespace."""
    return namespace.call(lambda: _dump_table(family, table))


def _dump_table(family: Family, table: str) -> TableDump:
    table_filter = _encode_attribute(1, table)
    name = table.encode() + b"\0"
    tables = [each for each in _dump(family, _GETTABLE) if each[1] == name]
    chains = [each for each in _dump(family, _GETCHAIN) if each[1] == name]
    rules: dict[bytes, list[Attributes]] = {}
    for each in _dump(family, _GETRULE, table_filter):
        rules.setdefault(each[2], []).append(_attributes(each, _HANDLES["rules"], _POSITION))
    sets = _dump(family, _GETSET, table_filter)
    return TableDump(
        _attributes(tables[0], _HANDLES["table"]),
        {each[2]: _attributes(_without_types(each), _HANDLES["sets"]) for each in sets},
        {each[3]: _attributes(each, _HANDLES["chains"]) for each in chains},
        rules,
        {each[2]: frozenset(_elements(family, table_filter, each[2])) for each in sets},
    )


def _encode_attribute(kind: int, value: str | bytes) -> bytes:
    content = value.encode() + b"\0" if isinstance(value, str) else value
    return struct.pack("=HH", len(content) + 4, kind) + content + b"\0" * (-len(content) % 4)


def _dump(family: Family, kind: int, filters: bytes = b"") -> list[dict[int, bytes]]:
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        payload = nfgenmsg(address_family(family)) + filters
        return [_parts(*found) for found in netlink.dump(_NFTABLES | kind, payload)]


def _parts(data: bytes, begin: int, end: int, header: int = 4) -> dict[int, bytes]:
    found = attributes(data, begin + header, end)
    return {kind: data[first:last] for kind, (first, last) in found.items()}


def _attributes(parts: dict[int, bytes], *without: int) -> Attributes:
    return tuple(sorted((kind, value) for kind, value in parts.items() if kind not in without))


def _without_types(parts: dict[int, bytes]) -> dict[int, bytes]:
    userdata, kept, offset = parts[_SET_USERDATA], b"", 0
    while offset < len(userdata):
        kind, size = userdata[offset : offset + 2]
        if kind not in {_KEY_TYPEOF, _DATA_TYPEOF}:
            kept += userdata[offset : offset + 2 + size]
        offset += 2 + size
    return parts | {_SET_USERDATA: kept}


def _elements(family: Family, table_filter: bytes, name: bytes) -> Iterator[Attributes]:
    for message in _dump(family, _GETSETELEM, table_filter + _encode_attribute(2, name)):
        listed, offset = message.get(3, b""), 0
        while offset < len(listed):
            (size,) = struct.unpack_from("=H", listed, offset)
            yield _attributes(_parts(listed, offset + 4, offset + size, header=0), _EXPIRATION)
            offset += (size + 3) & ~3


def recorded_proxy(
    scenario: str,
    family: Family,
    backend: Backend,
    namespace: Namespace | None = None,
    *,
    counters: bool = False,
) -> SingleFamilyProxy:
    """Return a proxy with the objects and the configuration of a recorded cluster, with connection counters if set."""
    store = Store("node-1", (*BASIC_KINDS, ServiceCIDR))
    for delta in (*replaces(scenario), Replace(ServiceCIDR, (ServiceCIDR("kubernetes", CIDRS),))):
        store.apply(delta)
    context = replace(nftables_context(scenario, family, store), connection_counters=counters)
    return SingleFamilyProxy(backend, context, store=store, namespace=namespace)


def nftables_context(scenario: str, family: Family, store: Store) -> Context:
    """Return the context of a recording in nftables mode, which serves NodePorts on the primary address by default."""
    context = recorded_context(scenario, family, store)
    if config(scenario).get("nodePortAddresses"):
        return context
    return replace(context, node_port_addresses=(OWN[family],))


def program(
    namespace: Namespace, scenario: str, family: Family, commit: Commit, *, counters: bool = False
) -> NftablesBackend:
    """Program a recorded cluster in a namespace and return the backend."""
    backend = NftablesBackend(NftTable(family, commit))
    recorded_proxy(scenario, family, backend, namespace, counters=counters).sync()
    return backend


def rendered(scenario: str, family: Family, *, counters: bool = False) -> str:
    """Render the table of a recorded cluster as text."""
    texts: list[str] = []
    recorded_proxy(scenario, family, NftablesPrinter(family, texts.append), counters=counters).sync()
    return "".join(texts)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_recorded_clusters_are_identical_over_netlink_nft_and_text(
    namespaces: Callable[[], Namespace], scenario: str, family: Family
) -> None:
    by_netlink, by_nft, by_text = namespaces(), namespaces(), namespaces()
    program(by_netlink, scenario, family, NetlinkCommit(family))
    program(by_nft, scenario, family, NftCommit(family))
    text = rendered(scenario, family)
    by_text.run(["nft", "-f", "-"], text)
    found = dump_table(by_netlink, family)
    assert found.chains
    assert dump_table(by_nft, family) == found
    assert dump_table(by_text, family) == found
    listed = by_netlink.run(["nft", "list", "table", table_family(family), TABLE]).stdout
    assert normalized(listed) == normalized(text)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", ["dual-stack", "session-affinity"])
def test_tables_with_counters_are_identical_over_netlink_nft_and_text(
    namespaces: Callable[[], Namespace], scenario: str, family: Family
) -> None:
    by_netlink, by_nft, by_text = namespaces(), namespaces(), namespaces()
    program(by_netlink, scenario, family, NetlinkCommit(family), counters=True)
    program(by_nft, scenario, family, NftCommit(family), counters=True)
    text = rendered(scenario, family, counters=True)
    assert text.count("\t\tcounter\n") == len(COUNTED_MAPS)
    by_text.run(["nft", "-f", "-"], text)
    found = dump_table(by_netlink, family)
    assert dump_table(by_nft, family) == found
    assert dump_table(by_text, family) == found
    listed = by_netlink.run(["nft", "list", "table", table_family(family), TABLE]).stdout
    assert normalized(listed) == normalized(text)
    NftablesSimulator(listed, family)  # it can parse counters


def normalized(text: str) -> str:
    """Sort the elements of each set in nft's listing of a table, and write priorities as numbers.

    Whether nft writes -110 or `dstnat - 10` depends on its version.
    """

    def listed(found: re.Match[str]) -> str:
        return "\n".join(sorted(re.split(r",\s+", found[1])))

    def numbered(found: re.Match[str]) -> str:
        name, offset = found.groups()
        return f"priority {PRIORITIES[name] + int((offset or '0').replace(' ', ''))};"

    text = re.sub(r"\bpriority ([a-z]+)(?: ([+-] \d+))?;", numbered, text)
    return re.sub(r"elements = \{ (.*?) \}\n", listed, text, flags=re.DOTALL)


ADDRESSES = {
    Family.IPV4: ("192.0.2.1", ("192.0.2.1/32", "192.0.2.0/25", "192.0.0.0/16", "192.0.0.0/12", "0.0.0.0/0")),
    Family.IPV6: ("2001:db8::1", ("2001:db8::1/128", "2001:db8::/64", "2001:db8::/61", "fd00::/8", "fc00::/7", "::/0")),
}
AFFINITY = nft.NftSet("affinity-A", (KeyField.SOURCE,), timeout=90_061, comment="clients of A")
CONNECTION = (KeyField.SOURCE, KeyField.DESTINATION, KeyField.PROTOCOL, KeyField.PORT)


def statements(family: Family) -> Iterator[nft.Statement]:
    """Yield every statement in every form."""
    _, networks = ADDRESSES[family]
    for network in networks:
        for negate in (False, True):
            yield nft.MatchSaddr(network, negate)
            yield nft.MatchDaddr(network, negate)
    for negate in (False, True):
        yield nft.MatchIifname("cni0", negate=negate)
        yield nft.MatchIifname("veth", prefix=True, negate=negate)
        yield nft.MatchIifname("longest-possibl", negate=negate)
    yield nft.Lookup((KeyField.DESTINATION,), names.CLUSTER_IPS)
    yield nft.Lookup((KeyField.SOURCE,), AFFINITY.name)
    yield nft.Lookup(CONNECTION, names.HAIRPINS)
    yield nft.FibLocal(KeyField.SOURCE)
    yield nft.FibLocal(KeyField.DESTINATION)
    yield nft.FibLocal(KeyField.DESTINATION, negate=True)
    for protocol in PROTOCOLS:
        yield nft.MatchL4Proto(protocol)
    yield nft.MatchSyn()
    yield nft.MatchSyn(negate=True)
    yield nft.MatchSocket(transparent=False)
    yield nft.MatchSocket(transparent=True)
    yield nft.Count("one")
    yield nft.Count("other")
    yield nft.CtStateNew()
    yield nft.CtStatusDnat()
    for bit in (0, 14, 30, 31):
        if bit < 31:  # nft lists the highest bit as a prefix, `!= 0x00000000/1`
            yield nft.MatchMark(1 << bit)
        yield nft.SetMark(1 << bit)
        yield nft.XorMark(1 << bit)
    yield nft.Numgen(2)
    yield nft.Numgen(1_000)
    yield nft.Masquerade()
    yield nft.UpdateSet(AFFINITY.name)
    yield nft.DnatMap(SERVICE_KEY, 3, names.SERVICE_ENDPOINTS)
    yield nft.DnatMap(NODE_PORT_KEY, 5_000, names.NODE_PORT_LOCAL_ENDPOINTS)
    yield nft.VerdictMap(SERVICE_KEY, names.SERVICE_IPS)
    yield nft.VerdictMap(NODE_PORT_KEY, names.NO_ENDPOINT_NODE_PORTS)
    yield nft.Goto("other")
    yield nft.Jump("other")
    yield nft.Drop()
    yield nft.Return()
    yield nft.Reject()


def everything(family: Family) -> Transaction:
    """Return a transaction for a table with all kinds of statements, chains and elements."""
    address, _ = ADDRESSES[family]
    rules = [rule(statement, comment=type(statement).__name__) for statement in statements(family)]
    sent = (rule(nft.MatchL4Proto(protocol), nft.Dnat(address, 8080)) for protocol in PROTOCOLS)
    hooks = (chain.hook for chain in base_chains(Context(family, "node-1")) if chain.hook)
    chains = [
        nft.NftChain("other", tuple(sent), comment="translates"),
        nft.NftChain("everything", tuple(rules)),
        *(nft.NftChain(f"base-{number}", (), hook=hook) for number, hook in enumerate(hooks)),
    ]
    change = Transaction(
        create_table=True, replace_table=True, added_sets=[*SETS, AFFINITY], added_chains=chains, added_rules=chains
    )
    size = len(pack_address(address)) + 4
    for number, each in enumerate(SETS):
        length = set_layout(each, family).key_size
        for value in (None,) if each.value is nft.MapValue.NONE else (DROP, "other"):
            key = bytes([6 + number]) * length
            key = key[:-8] + (node_port_key("UDP", 53) if value else node_port_key("TCP", 80)) if length >= 8 else key
            if each.value is nft.MapValue.ENDPOINT:
                pool = pack_endpoints([socket_text(address, port) for port in range(1, 4)])
                change.added_endpoints[each.name] = list(
                    endpoint_elements(key[: length - 12] + node_port_key("SCTP", 9), pool, size)
                )
            else:
                change.add_element(each.name, SetElement(key, value, "" if value is None else "ns/web"))
    return change


@pytest.mark.parametrize("family", Family)
def test_all_statements_and_elements_are_identical_over_netlink_and_nft(
    namespaces: Callable[[], Namespace], family: Family
) -> None:
    dumps: dict[type[Commit], TableDump] = {}
    listed = set()
    for commit in (NetlinkCommit, NftCommit):
        node = namespaces()
        node.call(lambda commit=commit: commit(family)(everything(family)))  # type: ignore[misc]
        dumps[commit] = dump_table(node, family)
        listed.add(normalized(node.run(["nft", "list", "table", table_family(family), TABLE]).stdout))
    change = everything(family)
    text = NftWriter(family).table(change.added_sets, change.all_added_elements(), change.added_chains)
    by_text = namespaces()
    by_text.run(["nft", "-f", "-"], text)
    assert dumps[NftCommit] == dumps[NetlinkCommit] == dump_table(by_text, family)
    assert listed == {normalized(text)}


@pytest.mark.parametrize("family", Family)
def test_deletions_are_identical_over_netlink_and_nft(namespaces: Callable[[], Namespace], family: Family) -> None:
    first = everything(family)
    # The kernel chooses the size of a set created without one when a rule updates it.
    other = nft.NftChain("other", (rule(nft.UpdateSet(AFFINITY.name)), rule(nft.Drop())))
    then = Transaction(
        deleted_elements={name: elements[1:] for name, elements in first.all_added_elements().items() if elements[1:]},
        flushed_chains=["everything", "base-0", "other"],
        deleted_chains=["everything", "base-0"],
        deleted_sets=[AFFINITY.name],
        added_sets=[replace(AFFINITY, timeout=60)],
        added_rules=[other],
    )
    dumps = []
    for commit in (NetlinkCommit, NftCommit):
        node = namespaces()
        for change in (first, then):
            node.call(lambda commit=commit, change=change: commit(family)(change))  # type: ignore[misc]
        dumps.append(dump_table(node, family))
    assert dumps[0] == dumps[1]
    assert set(dumps[0].rules) == {b"other\0"}
    assert len([each for elements in dumps[0].elements.values() for each in elements]) == len(SETS)
