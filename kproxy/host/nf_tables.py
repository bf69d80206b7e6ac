"""nf_tables queries: NAT support, rules of chains, the current generation ID; and awakening dormant tables."""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from kproxy.host.netlink import (
    MAX_ATTEMPTS,
    NETLINK_NETFILTER,
    BatchRejectedError,
    BatchSocket,
    DumpInterruptedError,
    NetlinkError,
    NetlinkSocket,
)
from kproxy.host.netlink_message import (
    NFGENMSG_SIZE,
    NLM_F_CREATE,
    attribute,
    attributes,
    iterate_attributes,
    nested,
    nfgenmsg,
    nfnl_type,
)
from kproxy.host.nf_tables_constants import (
    NF_INET_POST_ROUTING,
    NFNL_SUBSYS_NFTABLES,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETGEN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWTABLE,
    NFT_TABLE_F_DORMANT,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE,
    NFTA_GEN_ID,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_RULE_CHAIN,
    NFTA_RULE_HANDLE,
    NFTA_RULE_PAD,
    NFTA_RULE_POSITION,
    NFTA_RULE_TABLE,
    NFTA_TABLE_FLAGS,
    NFTA_TABLE_NAME,
)
from kproxy.model.types import Family

NF_IP_PRI_NAT_SRC = 100  # linux/netfilter_ipv4.h
_ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_PROBE_TABLE = "kproxy-probe"
_RULE_POSITION = {NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_POSITION, NFTA_RULE_PAD}
"""The attributes of a rule that tell where it is. The kernel sends them before those that describe what it does."""
_COUNTER = re.compile(rb"(?<=counter\0).{28}", re.DOTALL)
"""The numbers of packets and bytes in a statement `counter` of a rule: a nested attribute with two 64-bit integers."""


def nat_unsupported_reason(family: Family) -> str:
    """Return why the kernel rejects chains of type nat in a family, or "" if it accepts them. Raises `OSError`.

    If table nat has a chain POSTROUTING, the kernel supports NAT. Otherwise the kernel is probed, which takes about
    10 ms. It only checks a batch that would create a dormant table with a chain of type nat: nothing is created, and no
    notification is sent.
    """
    header = nfgenmsg(_ADDRESS_FAMILIES[family])
    if _has_chain(header + _string(NFTA_CHAIN_TABLE, "nat") + _string(NFTA_CHAIN_NAME, "POSTROUTING")):
        return ""
    created = ("a table", "a chain of type nat")
    with BatchSocket(NFNL_SUBSYS_NFTABLES) as netlink:
        try:
            netlink.check(
                [
                    (nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWTABLE), NLM_F_CREATE, header + _TABLE),
                    (nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWCHAIN), NLM_F_CREATE, header + _CHAIN),
                ]
            )
        except BatchRejectedError as error:
            first = error.rejections[0]
            what = created[first.index] if first.index >= 0 else "the probe transaction"
            return f"nf_tables rejected {what}: {first.reason}"
    return ""


def count_rules(family: Family, table: str, chain: str) -> int:
    """Return the number of rules in a chain, or 0 if the chain does not exist.

    The time that this takes does not depend on the number of other chains. Raises `OSError`. If any rule changed during
    the dump, the error is a `DumpInterruptedError`.
    """
    names = _string(NFTA_RULE_TABLE, table) + _string(NFTA_RULE_CHAIN, chain)
    request = nfgenmsg(_ADDRESS_FAMILIES[family]) + names
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return sum(1 for _ in netlink.dump(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETRULE), request))


def fingerprints(family: Family, groups: Iterable[Sequence[tuple[str, str]]]) -> list[int]:
    """Return a number for each group of chains, given as tables and names. It identifies the rules of these chains.

    Groups of chains with the same rules in the same order have the same number, also if the rules or the chains were
    written again. The number does not depend on packet counters. It is 0 if no chain has any rule. Chains without rules
    and chains that do not exist are not told apart. Sets count as the same if they have the same name. Numbers from
    different processes cannot be compared.

    One chain is dumped at a time: the time of a dump of a whole table grows with the square of its size.

    The dump of a chain is repeated if rules change meanwhile, but not that of all others: with 30,000 chains, it would
    never end while another family is being restored.

    Raises `OSError`. If the last attempt was interrupted, too, the error is a `DumpInterruptedError`.
    """
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        found = []
        for group in groups:
            chains = [_chain_digests(netlink, family, table, chain) for table, chain in group]
            found.append(hash(tuple(chains)) if any(chains) else 0)
        return found


def chain_names(family: Family) -> dict[str, set[str]]:
    """Return the names of the chains of each table that has any.

    Raises `OSError`, which may be a `DumpInterruptedError`.
    """
    names: dict[str, set[str]] = {}
    request = nfgenmsg(_ADDRESS_FAMILIES[family])
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        for data, begin, end in netlink.dump(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN), request):
            spans = attributes(data, begin + NFGENMSG_SIZE, end)
            table, chain = (data[slice(*spans[kind])].rstrip(b"\0") for kind in (NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME))
            names.setdefault(table.decode(errors="replace"), set()).add(chain.decode(errors="replace"))
    return names


def _table_attribute(netlink: NetlinkSocket, family: Family, table: str, wanted: int) -> bytes:
    """Return an attribute of a table, or b"" if the table does not exist."""
    request = nfgenmsg(_ADDRESS_FAMILIES[family]) + _string(NFTA_TABLE_NAME, table)
    found = b""
    try:
        for data, begin, end in netlink.get(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE), request):
            found = _attribute(data, begin, end, wanted)
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
    return found


def _chain_digests(netlink: NetlinkSocket, family: Family, table: str, chain: str) -> tuple[int, ...]:
    for _ in range(MAX_ATTEMPTS - 1):
        with suppress(DumpInterruptedError):  # the kernel has sent the dump to its end
            return tuple(_rule_digests(netlink, family, table, chain))
    return tuple(_rule_digests(netlink, family, table, chain))


def _rule_digests(netlink: NetlinkSocket, family: Family, table: str, chain: str) -> Iterator[int]:
    names = _string(NFTA_RULE_TABLE, table) + _string(NFTA_RULE_CHAIN, chain)
    request = nfgenmsg(_ADDRESS_FAMILIES[family]) + names
    for data, begin, end in netlink.dump(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETRULE), request):
        # Skip what differs between equal rules, such as the handle. Everything else follows it.
        for kind, first, _ in iterate_attributes(data, begin + NFGENMSG_SIZE, end):
            if kind not in _RULE_POSITION:
                yield hash(_COUNTER.sub(b"", data[first:end]))
                break
        else:
            yield 0


def _attribute(data: bytes, begin: int, end: int, wanted: int) -> bytes:
    spans = iterate_attributes(data, begin + NFGENMSG_SIZE, end)
    return next((data[first:last] for kind, first, last in spans if kind == wanted), b"")


def current_generation() -> int:
    """Return the generation ID of this network namespace, which every commit increments. Raises `OSError`."""
    generation = 0
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        for data, begin, end in netlink.get(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN), nfgenmsg()):
            spans = attributes(data, begin + NFGENMSG_SIZE, end)
            (generation,) = struct.unpack_from(">I", data, spans[NFTA_GEN_ID][0])
    return generation


def is_dormant(family: Family, table: str) -> bool:
    """Return whether a table is dormant: the kernel does not evaluate its chains. Raises `OSError`."""
    return bool(_table_flags(family, table) & NFT_TABLE_F_DORMANT)


def awaken(family: Family, table: str, before_commit: Callable[[int], object]) -> None:
    """Clear the flag of a dormant table.

    `before_commit` is called with the port ID of the netlink socket that is about to commit the change. Raises
    `OSError`, also if the kernel does not permit the change, for example because the table belongs to another process.
    """
    flags = _table_flags(family, table) & ~NFT_TABLE_F_DORMANT
    message = nfgenmsg(_ADDRESS_FAMILIES[family]) + _string(NFTA_TABLE_NAME, table) + _int32(NFTA_TABLE_FLAGS, flags)
    with BatchSocket(NFNL_SUBSYS_NFTABLES) as batch:
        before_commit(batch.port)
        try:
            batch.commit([(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWTABLE), 0, message)])
        except BatchRejectedError as error:
            first = error.rejections[0]
            raise OSError(first.code, first.reason) from None


def _table_flags(family: Family, table: str) -> int:
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return int.from_bytes(_table_attribute(netlink, family, table, NFTA_TABLE_FLAGS))


def _has_chain(request: bytes) -> bool:
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as netlink:
            return any(True for _ in netlink.get(nfnl_type(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN), request))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return False
        raise


def _string(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _int32(kind: int, number: int) -> bytes:
    return attribute(kind, struct.pack(">i", number))


_TABLE = _string(NFTA_TABLE_NAME, _PROBE_TABLE) + _int32(NFTA_TABLE_FLAGS, NFT_TABLE_F_DORMANT)
_CHAIN = (
    _string(NFTA_CHAIN_TABLE, _PROBE_TABLE)
    + _string(NFTA_CHAIN_NAME, "postrouting")
    + nested(
        NFTA_CHAIN_HOOK,
        _int32(NFTA_HOOK_HOOKNUM, NF_INET_POST_ROUTING),
        _int32(NFTA_HOOK_PRIORITY, NF_IP_PRI_NAT_SRC),
    )
    + _string(NFTA_CHAIN_TYPE, "nat")
)
