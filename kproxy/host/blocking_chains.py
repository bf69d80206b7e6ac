"""Find chains of other programs in nf_tables that drop all packets of Services."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator

from msgspec import Struct

from kproxy.host import nf_tables_constants as nf
from kproxy.host.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket
from kproxy.host.netlink_message import NFGENMSG_SIZE, attribute, attributes, iterate_attributes, nfgenmsg, nfnl_type
from kproxy.model.types import Family

_NFPROTO_INET = 1
_FAMILIES = {
    Family.IPV4: {"ip": int(socket.AF_INET), "inet": _NFPROTO_INET},
    Family.IPV6: {"ip6": int(socket.AF_INET6), "inet": _NFPROTO_INET},
}
"""The nf_tables families whose chains get the packets of an IP family, by their names in nft."""
_IPTABLES_CHAINS = ("PREROUTING", "FORWARD", "OUTPUT", "POSTROUTING")
_IPTABLES_TABLES = frozenset({"nat", "filter", "mangle", "raw", "security"})
"""In these tables, which can have a hundred thousand other chains, only iptables' built-in chains are looked at."""
_HOOKS = {nf.NF_INET_PRE_ROUTING: "prerouting", 2: "forward", 3: "output", nf.NF_INET_POST_ROUTING: "postrouting"}
"""The hooks that all forwarded packets or all packets of local processes pass. The hook `input` is not among them,
because Services whose endpoints are on other nodes do not need it.
"""
_LAST_NAT_PRIORITY = {"prerouting": -100, "output": -100, "postrouting": 100}
"""The priority of the NAT chains of kproxy. After a NAT rule has applied, later chains of type nat are skipped."""
_MAX_RULES = 1000
_HARMLESS = frozenset({"counter", "log", "meta", "payload", "cmp", "bitwise", "range", "ct", "fib", "rt", "exthdr"}) | {
    *("byteorder", "limit", "quota", "connlimit", "socket", "osf", "numgen", "hash", "match", "xfrm", "last"),
    *("lookup", "comment"),
}
"""Expressions that match, count or log packets, but do not end the evaluation of the chain."""
_UNCONDITIONAL = frozenset({"counter", "log", "last", "comment"})
_NFTA_TARGET_NAME = _NFTA_MATCH_NAME = 1  # linux/netfilter/nf_tables_compat.h
_BE32 = struct.Struct(">i")


class _Chain(Struct, frozen=True):
    family: str
    table: str
    name: str
    type: str
    hook: str
    priority: int
    policy_drops: bool

    @property
    def text(self) -> str:
        return f"chain {self.name} of table {self.family} {self.table} (hook {self.hook}, priority {self.priority})"


def blocking_chains(family: Family, own_tables: Collection[str] = ()) -> list[str]:
    """Return a line for each chain that certainly drops or rejects all packets to Services of a family.

    These are chains at the hooks prerouting, forward, output and postrouting that drop each packet that reaches them,
    or that drop it unless one of their rules accepts it, if they are chains of iptables outside of table `filter`,
    where nobody needs such a policy. Chains with rules that accept or jump are otherwise not reported: some packets may
    pass. kproxy's `own_tables` are skipped. Raises `OSError`.
    """
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:
        return [
            problem
            for name, number in _FAMILIES[family].items()
            for table in _tables(netlink, number)
            if name == "inet" or table not in own_tables
            for chain in _base_chains(netlink, name, number, table)
            if (problem := _problem(chain, number))
        ]


def _problem(chain: _Chain, family: int) -> str:
    if chain.type == "nat" and chain.priority > _LAST_NAT_PRIORITY.get(chain.hook, 0):
        return ""
    if _drops_everything(chain, family):
        return f"{chain.text} drops all packets, also those of Services"
    if chain.policy_drops and chain.family != "inet" and chain.table in _IPTABLES_TABLES - {"filter", "security"}:
        return f"{chain.text} has policy drop: packets of Services that none of its rules accepts are dropped"
    return ""


def _drops_everything(chain: _Chain, family: int) -> bool:
    request = nfgenmsg(family) + _string(nf.NFTA_RULE_TABLE, chain.table) + _string(nf.NFTA_RULE_CHAIN, chain.name)
    kind = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETRULE)
    with NetlinkSocket(NETLINK_NETFILTER) as netlink:  # of its own, because the dump is not always read to its end
        for number, (data, begin, end) in enumerate(netlink.dump(kind, request)):
            if number == _MAX_RULES:
                return False
            spans = attributes(data, begin + NFGENMSG_SIZE, end)
            expressions = list(_expressions(data, spans.get(nf.NFTA_RULE_EXPRESSIONS)))
            others = {_name(data, *span) for span in expressions if not _drops(data, *span)}
            if others <= _UNCONDITIONAL and any(_drops(data, *span) for span in expressions):
                return True
            if not others <= _HARMLESS:
                return False
    return chain.policy_drops


def _expressions(data: bytes, span: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    if span is not None:
        yield from ((begin, end) for _, begin, end in iterate_attributes(data, *span))


def _name(data: bytes, begin: int, end: int) -> str:
    """Return the name of an expression, `vmap` for the lookup of a verdict, or `comment` for a comment of iptables."""
    name, values = _parts(data, begin, end)
    if name == "lookup" and nf.NFTA_LOOKUP_DREG in values:
        return "vmap"
    return "comment" if name == "match" and _text(data, values.get(_NFTA_MATCH_NAME)) == "comment" else name


def _parts(data: bytes, begin: int, end: int) -> tuple[str, dict[int, tuple[int, int]]]:
    spans = attributes(data, begin, end)
    values = attributes(data, *spans[nf.NFTA_EXPR_DATA]) if nf.NFTA_EXPR_DATA in spans else {}
    return _text(data, spans.get(nf.NFTA_EXPR_NAME)), values


def _drops(data: bytes, begin: int, end: int) -> bool:
    """Return whether an expression drops or rejects the packet."""
    name, values = _parts(data, begin, end)
    if name == "reject":
        return True
    if name == "target":
        return _text(data, values.get(_NFTA_TARGET_NAME)) in {"REJECT", "DROP"}
    if name != "immediate" or nf.NFTA_IMMEDIATE_DATA not in values:
        return False
    verdict = attributes(data, *values[nf.NFTA_IMMEDIATE_DATA]).get(nf.NFTA_DATA_VERDICT)
    code = attributes(data, *verdict).get(nf.NFTA_VERDICT_CODE) if verdict is not None else None
    return code is not None and _BE32.unpack_from(data, code[0])[0] == nf.NF_DROP


def _tables(netlink: NetlinkSocket, family: int) -> list[str]:
    """Return the names of the tables that are not dormant."""
    found = []
    for data, begin, end in netlink.dump(nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETTABLE), nfgenmsg(family)):
        spans = attributes(data, begin + NFGENMSG_SIZE, end)
        first, last = spans.get(nf.NFTA_TABLE_FLAGS, (0, 0))
        if not int.from_bytes(data[first:last]) & nf.NFT_TABLE_F_DORMANT:
            found.append(_text(data, spans.get(nf.NFTA_TABLE_NAME)))
    return found


def _base_chains(netlink: NetlinkSocket, name: str, family: int, table: str) -> list[_Chain]:
    kind = nfnl_type(nf.NFNL_SUBSYS_NFTABLES, nf.NFT_MSG_GETCHAIN)
    request = nfgenmsg(family) + _string(nf.NFTA_CHAIN_TABLE, table)
    found = []
    if name == "inet" or table not in _IPTABLES_TABLES:
        found += [_chain(*message, name, table) for message in netlink.dump(kind, request)]
    else:
        for chain in _IPTABLES_CHAINS:
            try:
                replies = list(netlink.get(kind, request + _string(nf.NFTA_CHAIN_NAME, chain)))
            except NetlinkError as error:
                if error.errno != errno.ENOENT:
                    raise
            else:
                found += [_chain(*message, name, table) for message in replies]
    return [chain for chain in found if chain is not None]


def _chain(data: bytes, begin: int, end: int, family: str, table: str) -> _Chain | None:
    """Return a base chain. Return None for another chain, a chain at another hook, or one of another table."""
    spans = attributes(data, begin + NFGENMSG_SIZE, end)
    if nf.NFTA_CHAIN_HOOK not in spans or _text(data, spans.get(nf.NFTA_CHAIN_TABLE)) != table:
        return None
    hooks = attributes(data, *spans[nf.NFTA_CHAIN_HOOK])
    hook = _HOOKS.get(_int32(data, hooks[nf.NFTA_HOOK_HOOKNUM]))
    if hook is None:
        return None
    drops = nf.NFTA_CHAIN_POLICY in spans and _int32(data, spans[nf.NFTA_CHAIN_POLICY]) == nf.NF_DROP
    name, chain_type = (_text(data, spans.get(each)) for each in (nf.NFTA_CHAIN_NAME, nf.NFTA_CHAIN_TYPE))
    return _Chain(family, table, name, chain_type, hook, _int32(data, hooks[nf.NFTA_HOOK_PRIORITY]), drops)


def _int32(data: bytes, span: tuple[int, int]) -> int:
    number: int = _BE32.unpack_from(data, span[0])[0]
    return number


def _string(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def _text(data: bytes, span: tuple[int, int] | None) -> str:
    return data[span[0] : span[1]].rstrip(b"\0").decode(errors="replace") if span is not None else ""
