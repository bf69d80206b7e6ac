"""Read nftables over netlink, for nodes without the program nft: only kproxy's own table is decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkSocket, retry_interrupted
from kproxy.host.netlink_message import NFGENMSG_SIZE, attributes, nfgenmsg, nfnl_type
from kproxy.model.types import Family
from kproxy.nftables.base_table import SETS
from kproxy.nftables.decode import TableReader
from kproxy.nftables.elements import SetElement, set_layout
from kproxy.nftables.encode import HOOK_NUMBERS
from kproxy.nftables.names import TABLE, table_family
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.rule_decoder import decode_any_rule
from kproxy.nftables.ruleset import KeyField, NftChain, NftRule, NftSet
from kproxy.nftables.snapshot import TableSnapshot

_FAMILIES = {1: "inet", 2: "ip", 5: "netdev", 10: "ip6"}
"""The families whose chains IP packets traverse (NFPROTO_*, linux/netfilter.h)."""


class ReadTables(Struct, frozen=True):
    """The tables that could be decoded, as `nft list ruleset` prints them, and the family and name of the others."""

    text: str
    unreadable: tuple[tuple[str, str], ...]


def read_tables(family: Family, is_known: Callable[[str, str], bool]) -> ReadTables:
    """Read the tables that packets of an IP family traverse. Raises `OSError`.

    Tables without rules are omitted, and those for which `is_known` returns True. It gets the family and the name.
    """
    own = (table_family(family), TABLE)
    found = [place for place in retry_interrupted(lambda: _tables_with_effect(family)) if not is_known(*place)]
    text = retry_interrupted(lambda: _own_table(family)) if own in found else ""
    return ReadTables(text, tuple(place for place in found if place != own or not text))


def _tables_with_effect(family: Family) -> list[tuple[str, str]]:
    """Return the family and name of the tables whose base chains have rules, or drop packets by their policy."""
    other = "ip" if family is Family.IPV6 else "ip6"
    found: dict[tuple[str, str], None] = {}
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        dormant = {
            (place, _text(data, spans[nf.NFTA_TABLE_NAME]))
            for place, data, spans in _dump(netlink, nf.NFT_MSG_GETTABLE)
            if _number(data, spans[nf.NFTA_TABLE_FLAGS]) & nf.NFT_TABLE_F_DORMANT
        }
        for place, data, spans in _dump(netlink, nf.NFT_MSG_GETCHAIN):
            if nf.NFTA_CHAIN_HOOK not in spans or place == other:
                continue
            policy = _number(data, spans[nf.NFTA_CHAIN_POLICY]) if nf.NFTA_CHAIN_POLICY in spans else nf.NF_ACCEPT
            if policy != nf.NF_ACCEPT or _number(data, spans[nf.NFTA_CHAIN_USE]):
                found[place, _text(data, spans[nf.NFTA_CHAIN_TABLE])] = None
    return [table for table in found if table not in dormant]


def _dump(netlink: NetlinkSocket, message: int) -> Iterator[tuple[str, bytes, dict[int, tuple[int, int]]]]:
    """Yield the family of each object in a dump, and its attributes."""
    for data, begin, end in netlink.dump(nfnl_type(nf.NFNL_SUBSYS_NFTABLES, message), nfgenmsg()):
        if data[begin] in _FAMILIES:
            yield _FAMILIES[data[begin]], data, attributes(data, begin + NFGENMSG_SIZE, end)


def _own_table(family: Family) -> str:
    """Return kproxy's table as nft lists it, or "" if it has something that kproxy does not write."""
    reader = TableReader(family)
    snapshot = reader.snapshot()
    if snapshot is None or any(hook and hook.hook not in HOOK_NUMBERS for hook in snapshot.chains.values()):
        return ""
    sets = [each for name in snapshot.sets if (each := _definition(name, snapshot, family)) is not None]
    chains: dict[str, list[NftRule]] = {name: [] for name in snapshot.chains}
    for chain, content in reader.rules():
        rule = decode_any_rule(content, family)
        if rule is None or chain not in chains:
            return ""
        chains[chain].append(rule)
    elements = {each.name: list((snapshot.elements.get(each.name) or reader.elements(each)).values()) for each in sets}
    if len(sets) < len(snapshot.sets) or any(_is_foreign(one) for each in elements.values() for one in each):
        return ""
    listed = [NftChain(name, tuple(rules), hook=snapshot.chains[name]) for name, rules in chains.items()]
    return NftWriter(family).table(sets, elements, listed)


def _is_foreign(element: SetElement) -> bool:
    """Return whether an element has a verdict that no element of kproxy has (see `decode`)."""
    return isinstance(element.value, str) and element.value.startswith("verdict ")


def _definition(name: str, snapshot: TableSnapshot, family: Family) -> NftSet | None:
    """Return a set of kproxy, without counters, or None if it is not one of kproxy's."""
    layout = snapshot.sets[name]
    found = next((each for each in SETS if each.name == name), None)
    if found is not None:
        return found if name in snapshot.elements else None
    found = NftSet(name, (KeyField.SOURCE,), timeout=layout.timeout // 1000)
    return found if layout.timeout and set_layout(found, family) == layout else None


def _text(data: bytes, span: tuple[int, int]) -> str:
    return data[slice(*span)].rstrip(b"\0").decode(errors="replace")


def _number(data: bytes, span: tuple[int, int]) -> int:
    return int.from_bytes(data[slice(*span)], "big")
