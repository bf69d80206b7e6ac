"""The packets whose fate in nftables mode differs from that in iptables mode, and the reasons."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

from tests.packets.senders import (
    LOCAL_POD_CIDRS,
    NODE,
    NODE_ADDRESSES,
    NODE_AS,
    SECOND_NODE_ADDRESSES,
    SERVICE_CIDRS,
    UNDEFINED_PORT,
    source_of,
)
from tests.packets.table import HEADER, Row, read_row, read_table, rows_text, split_socket

PATH = Path(__file__).with_name("nftables.txt")
_HEADING = "## "
REJECTED = "reject port-unreachable"


class Reason(Enum):
    """Every reason why a fate differs in nftables mode."""

    UNDEFINED_PORT = "an undefined port of a ClusterIP rejects connections"
    UNALLOCATED = "packets to an unallocated address in a ServiceCIDR are dropped"
    OVERLAP = "packets to a node whose address is in a ServiceCIDR are dropped, even after DNAT"
    REFUSED_FROM_NODE = "a VIP or external IP without endpoints also rejects packets of this node"
    HAIRPIN = "hairpin packets are masqueraded only if the endpoint may be on this node"
    PRIMARY_ADDRESS = "by default, NodePorts are reachable only at the primary addresses of this node"
    LOOPBACK = "NodePorts are not reachable at 127.0.0.1"
    MARTIAN = "the kernel, not a rule, drops packets from other hosts to 127.0.0.1, because route_localnet is off"


class Difference(NamedTuple):
    """A row with its fate in nftables mode, and the reason why it differs from iptables mode."""

    reason: Reason
    row: Row


def reason_for(row: Row, fate: str) -> Reason:
    """Return the reason why a row's fate differs in nftables mode. Raises `ValueError` unless exactly one fits."""
    fitting = [reason for reason, fits in _FITS.items() if fits(row, fate)]
    if len(fitting) != 1:
        names = ", ".join(reason.name for reason in fitting) or "no reason"
        raise ValueError(f"{row}: {row.fate} in iptables mode, {fate} in nftables mode: {names} fits")
    return fitting[0]


def read_differences() -> list[Difference]:
    """Read all rows whose fate differs, with the reasons they are listed under."""
    found = []
    reason: Reason | None = None
    for line in PATH.read_text().splitlines():
        if line.startswith(_HEADING):
            reason = Reason(line.removeprefix(_HEADING))
        elif line and not line.startswith("#"):
            assert reason, f"no reason above this row: {line}"
            found.append(Difference(reason, read_row(line)))
    return found


def read_nftables_table() -> list[Row]:
    """Read all rows of the table, with their fates in nftables mode."""
    fates = {row._replace(fate=""): row.fate for _, row in read_differences()}
    return [row._replace(fate=fates.get(row._replace(fate=""), row.fate)) for row in read_table()]


def read_kproxy_table() -> list[Row]:
    """Read all rows of the table, with their fates under kproxy's rules in nftables mode.

    They are those of kube-proxy, except that kproxy never drops packets to an endpoint, or the node's packets to its
    own addresses, because of a ServiceCIDR (docs/differences.md). These packets have the same fate as in iptables mode.
    As in kube-proxy 1.38, packets to NodePorts on loopback addresses are rejected.
    """
    fates = {row._replace(fate=""): row.fate for row in read_table()}
    own = {
        row._replace(fate="")
        for reason, row in read_differences()
        if reason is Reason.OVERLAP
        and (
            (row.sender == NODE and row.address in NODE_ADDRESSES.values())
            or fates[row._replace(fate="")].startswith("dnat")
        )
    }
    assert own
    rows = [
        row._replace(fate=fates[row._replace(fate="")]) if row._replace(fate="") in own else row
        for row in read_nftables_table()
    ]
    return [row._replace(fate=REJECTED) if _is_to_loopback_node_port(row) else row for row in rows]


def differences_text(differences: Iterable[Difference]) -> str:
    """Format the differences for their file: grouped by reason, with aligned columns."""
    by_reason: dict[Reason, list[Row]] = {reason: [] for reason in Reason}
    for reason, row in differences:
        by_reason[reason].append(row)
    return HEADER + "".join(
        f"\n{_HEADING}{reason.value}\n\n{rows_text(rows)}" for reason, rows in by_reason.items() if rows
    )


def _in_service_cidr(address: str) -> bool:
    return any(ip_address(address) in ip_network(cidr) for cidr in SERVICE_CIDRS)


def _is_node_address(address: str) -> bool:
    """Return whether an address is in the network of the recorded nodes, which is part of the IPv4 ServiceCIDR."""
    return ip_address(address) in ip_network("10.99.0.0/24")


def _destinations(row: Row) -> list[str]:
    """Return the destination addresses of a packet after DNAT in iptables mode, one for each possible endpoint."""
    endpoints = [
        split_socket(each)[0] for part in re.findall(r"dnat\S* ([^;]+)", row.fate) for each in part.split(", ")
    ]
    return endpoints or [row.address]


def _is_to_loopback(row: Row) -> bool:
    return ip_address(row.address).is_loopback


def _is_to_loopback_node_port(row: Row) -> bool:
    return _is_to_loopback(row) and row.port != UNDEFINED_PORT


def _is_unallocated(row: Row, fate: str) -> bool:
    no_node = _in_service_cidr(row.address) and not _is_node_address(row.address)
    return no_node and (row.fate, fate) == ("untouched", "drop")


def _overlaps(row: Row, fate: str) -> bool:
    return fate == "drop" and row.fate != "drop" and all(_is_node_address(each) for each in _destinations(row))


def _is_hairpin(row: Row, fate: str) -> bool:
    """Return whether a sender on another node reaches itself, and the packet is no longer masqueraded."""
    source = source_of(row)
    own = [socket for socket in re.findall(r"dnat\S*\+masq\S* ([^;,]+)", row.fate) if split_socket(socket)[0] == source]
    local = any(ip_address(source) in cidr for cidr in LOCAL_POD_CIDRS)
    return bool(own) and not local and "masq" not in fate and own[0] in fate


_FITS: dict[Reason, Callable[[Row, str], bool]] = {
    Reason.UNDEFINED_PORT: lambda row, fate: (
        _in_service_cidr(row.address) and (row.fate, fate) == ("untouched", "reject port-unreachable")
    ),
    Reason.UNALLOCATED: _is_unallocated,
    Reason.OVERLAP: _overlaps,
    Reason.REFUSED_FROM_NODE: lambda row, fate: (
        row.sender == NODE
        and not _in_service_cidr(row.address)
        and (row.fate, fate) == ("untouched", "reject port-unreachable")
    ),
    Reason.HAIRPIN: _is_hairpin,
    Reason.PRIMARY_ADDRESS: lambda row, fate: (
        row.sender.startswith(NODE_AS)
        and row.address in SECOND_NODE_ADDRESSES.values()
        and row.fate != "untouched"
        and fate == "untouched"
    ),
    Reason.LOOPBACK: lambda row, fate: _is_to_loopback(row) and row.fate != "drop" and fate == "untouched",
    Reason.MARTIAN: lambda row, fate: _is_to_loopback(row) and (row.fate, fate) == ("drop", "untouched"),
}
"""For each reason, a predicate on a row and its fate in nftables mode."""
