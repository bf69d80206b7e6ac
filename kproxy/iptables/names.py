"""Chain names. They are a contract: people grep for them, tools parse them, kube-proxy uses the same."""

from __future__ import annotations

from base64 import b32encode
from hashlib import sha256
from typing import NamedTuple


class Chain(NamedTuple):
    """A chain by its table and name."""

    table: str
    name: str


NAT_SERVICES = Chain("nat", "KUBE-SERVICES")
NAT_NODEPORTS = Chain("nat", "KUBE-NODEPORTS")
FILTER_SERVICES = Chain("filter", "KUBE-SERVICES")
FILTER_EXTERNAL_SERVICES = Chain("filter", "KUBE-EXTERNAL-SERVICES")
FILTER_NODEPORTS = Chain("filter", "KUBE-NODEPORTS")
FILTER_PROXY_FIREWALL = Chain("filter", "KUBE-PROXY-FIREWALL")
FILTER_FORWARD = Chain("filter", "KUBE-FORWARD")
FILTER_FIREWALL = Chain("filter", "KUBE-FIREWALL")
MARK_MASQ = Chain("nat", "KUBE-MARK-MASQ")
POSTROUTING = Chain("nat", "KUBE-POSTROUTING")

DISPATCH = (
    NAT_SERVICES,
    NAT_NODEPORTS,
    FILTER_SERVICES,
    FILTER_EXTERNAL_SERVICES,
    FILTER_NODEPORTS,
    FILTER_PROXY_FIREWALL,
)
"""The chains that lead from a packet's destination to a Service: each Service port adds rules to some of them."""

CANARIES = tuple(Chain(table, "KUBE-PROXY-CANARY") for table in ("mangle", "nat", "filter"))
"""Empty chains that show, by being gone, that somebody flushed a table."""

PORT_CHAIN_PREFIXES = ("KUBE-XLB-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-")
"""How the names of chains begin that belong to one service port each, all of them in table nat.

A chain jumps only to chains of a prefix further right. KUBE-XLB- is what kube-proxy wrote before 1.24.
"""


def port_hash(port_name: str, protocol: str, socket: str = "") -> str:
    """Return the 16 characters that end the name of a service port's or (with its `ip:port`) endpoint's chain.

    `port_name` is `namespace/name:port`; base32 of SHA-256, so that names fit the 28 characters of a chain name.
    """
    digest = sha256(f"{port_name}{protocol.lower()}{socket}".encode()).digest()
    return b32encode(digest[:10]).decode()


def deletion_order(chain: Chain) -> int:
    """Return a sort key that puts chains of service ports before those that they jump to."""
    return next((rank for rank, prefix in enumerate(PORT_CHAIN_PREFIXES) if chain.name.startswith(prefix)), 0)
