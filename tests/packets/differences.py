"""Where nftables mode differs from iptables mode, packet by packet, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import Enum
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

from tests.packets.senders import (
    HERE,
    HOLDER,
    NODE,
    SECOND_NODE_ADDRESSES,
    SERVICE_CIDRS,
    source_of,
)
from tests.packets.table import HEAD, Row, read_row, read_table, rows_text, split_socket

PATH = Path(__file__).with_name("nftables.txt")
_HEADING = "## "


class Reason(Enum):
    """All the reasons there are for another fate in nftables mode."""

    UNDEFINED_PORT = "an undefined port of a ClusterIP refuses"
    UNALLOCATED = "what goes to an address of a ServiceCIDR that no Service has is dropped"
    OVERLAP = "so is what goes to a node with an address in a ServiceCIDR, even after translation"
    REFUSED_FROM_NODE = "a VIP or external IP without endpoints refuses this node's own packets, too"
    HAIRPIN = "only an endpoint that may be on this node is masqueraded when it is sent to itself"
    PRIMARY_ADDRESS = "NodePorts answer on this node's primary addresses only, by default"
    LOOPBACK = "NodePorts never answer on 127.0.0.1"
    MARTIAN = "what a neighbour sends to 127.0.0.1 is left for the kernel to drop, as route_localnet stays off"


class Difference(NamedTuple):
    """A row with its fate in nftables mode, and why that is not the one in iptables mode."""

    reason: Reason
    row: Row


def reason_for(row: Row, fate: str) -> Reason:
    """Return why a row's fate becomes another one in nftables mode; `ValueError` if no reason fits, or several."""
    fitting = [reason for reason, fits in _FITS.items() if fits(row, fate)]
    if len(fitting) != 1:
        names = ", ".join(reason.name for reason in fitting) or "no reason"
        raise ValueError(f"{row}: {row.fate} becomes {fate}: {names}")
    return fitting[0]


def read_differences() -> list[Difference]:
    """Return all rows whose fate differs, with the reasons under which they stand."""
    found = []
    reason: Reason | None = None
    for line in PATH.read_text().splitlines():
        if line.startswith(_HEADING):
            reason = Reason(line.removeprefix(_HEADING))
        elif line and not line.startswith("#"):
            assert reason, f"{line}: without a reason"
            found.append(Difference(reason, read_row(line)))
    return found


def read_nftables_table() -> list[Row]:
    """Return all rows of the table, with their fates in nftables mode."""
    fates = {row._replace(fate=""): row.fate for _, row in read_differences()}
    return [row._replace(fate=fates.get(row._replace(fate=""), row.fate)) for row in read_table()]


def differences_text(differences: Iterable[Difference]) -> str:
    """Return the differences as they stand in their file: by reason, with the columns below each other."""
    found: dict[Reason, list[Row]] = {reason: [] for reason in Reason}
    for reason, row in differences:
        found[reason].append(row)
    return HEAD + "".join(f"\n{_HEADING}{reason.value}\n\n{rows_text(rows)}" for reason, rows in found.items() if rows)


def _in_service_cidr(address: str) -> bool:
    return any(ip_address(address) in ip_network(cidr) for cidr in SERVICE_CIDRS)


def _of_recorded_nodes(address: str) -> bool:
    """Whether an address is in the network of the recorded nodes, which lies in the ServiceCIDR of IPv4."""
    return ip_address(address) in ip_network("10.99.0.0/24")


def _destinations(row: Row) -> list[str]:
    """Return where a packet goes after its translation in iptables mode: one address, unless by chance."""
    found = [split_socket(each)[0] for part in re.findall(r"dnat\S* ([^;]+)", row.fate) for each in part.split(", ")]
    return found or [row.address]


def _loops_back(row: Row) -> bool:
    return ip_address(row.address).is_loopback


def _is_unallocated(row: Row, fate: str) -> bool:
    plain = _in_service_cidr(row.address) and not _of_recorded_nodes(row.address)
    return plain and (row.fate, fate) == ("untouched", "drop")


def _overlaps(row: Row, fate: str) -> bool:
    return fate == "drop" and row.fate != "drop" and all(_of_recorded_nodes(each) for each in _destinations(row))


def _is_hairpin(row: Row, fate: str) -> bool:
    """Whether the only thing that changes is that the sender, not of this node, sees its own address again."""
    source = source_of(row)
    own = [socket for socket in re.findall(r"dnat\S*\+masq\S* ([^;,]+)", row.fate) if split_socket(socket)[0] == source]
    here = any(ip_address(source) in cidr for cidr in HERE)
    return bool(own) and not here and "masq" not in fate and own[0] in fate


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
        row.sender.startswith(HOLDER)
        and row.address in SECOND_NODE_ADDRESSES.values()
        and row.fate != "untouched"
        and fate == "untouched"
    ),
    Reason.LOOPBACK: lambda row, fate: _loops_back(row) and row.fate != "drop" and fate == "untouched",
    Reason.MARTIAN: lambda row, fate: _loops_back(row) and (row.fate, fate) == ("drop", "untouched"),
}
"""What must be true of a row and its fate in nftables mode for a reason to be its reason."""
