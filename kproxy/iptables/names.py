"""Chain names. They are a contract: people grep for them, tools parse them, kube-proxy uses the same."""

from __future__ import annotations

import re
from base64 import b32encode
from hashlib import sha256
from typing import NamedTuple


class ChainName(NamedTuple):
    """A chain by its table and name."""

    table: str
    name: str


NAT_SERVICES = ChainName("nat", "KUBE-SERVICES")
NAT_NODEPORTS = ChainName("nat", "KUBE-NODEPORTS")
FILTER_SERVICES = ChainName("filter", "KUBE-SERVICES")
FILTER_EXTERNAL_SERVICES = ChainName("filter", "KUBE-EXTERNAL-SERVICES")
FILTER_NODEPORTS = ChainName("filter", "KUBE-NODEPORTS")
FILTER_PROXY_FIREWALL = ChainName("filter", "KUBE-PROXY-FIREWALL")
FILTER_FORWARD = ChainName("filter", "KUBE-FORWARD")
FILTER_FIREWALL = ChainName("filter", "KUBE-FIREWALL")
MARK_MASQ = ChainName("nat", "KUBE-MARK-MASQ")
POSTROUTING = ChainName("nat", "KUBE-POSTROUTING")
DISPATCH = (
    NAT_SERVICES,
    NAT_NODEPORTS,
    FILTER_SERVICES,
    FILTER_EXTERNAL_SERVICES,
    FILTER_NODEPORTS,
    FILTER_PROXY_FIREWALL,
)
"""The chains that lead from a packet's destination to a Service: each Service port adds rules to some of them."""
CANARIES = tuple(ChainName(table, "KUBE-PROXY-CANARY") for table in ("mangle", "nat", "filter"))
"""Empty chains that show, by being gone, that somebody flushed a table."""
PORT_CHAIN_PREFIXES = ("KUBE-XLB-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-")
"""How the names of chains begin that belong to one service port each, all of them in table nat.

A chain jumps only to chains of a prefix further right. KUBE-XLB- is what kube-proxy wrote before 1.24.
"""
SHARD_STEMS = {
    NAT_SERVICES: "KUBE-SVC-",
    NAT_NODEPORTS: "KUBE-EXT-",
    FILTER_SERVICES: "KUBE-SVC-",
    FILTER_EXTERNAL_SERVICES: "KUBE-EXT-",
    FILTER_NODEPORTS: "KUBE-SVL-",
    FILTER_PROXY_FIREWALL: "KUBE-FW-",
}
"""How the names of the chains begin that a dispatch chain is split into: `KUBE-SVC-10.96.16.0/20`.

kube-proxy deletes chains of table nat that begin like this and that it does not use. That matters when it takes over:
as long as a chain that it leaves alone jumps to a Service's, it could not delete that Service's.
"""
_MOST_BITS = 128
"""Of a destination: those of an IPv6 address."""
_SHARD = re.compile(
    r"KUBE-(?:SVC|EXT|SVL|FW)-"
    r"(?:(?:\d+\.){3}\d+/(?P<four>\d+)|[A-Z2-7]{15}/(?P<six>\d+)|(?:tcp|udp|sctp)-(?P<low>\d+)-(?P<high>\d+))"
)


def network_label(network: str) -> str:
    """Return what the name of a shard ends with: its `address/length`, the address as a hash if that is of IPv6."""
    address, _, length = network.partition("/")
    return f"{b32encode(sha256(address.encode()).digest()).decode()[:15]}/{length}" if ":" in address else network


def ports_label(protocol: str, low: int, high: int) -> str:
    """Return what the name of a shard ends with that is for a range of the node's ports."""
    return f"{protocol}-{low}-{high}"


def is_shard(chain: ChainName) -> bool:
    """Return whether a chain is one that a dispatch chain is split into."""
    return _shard_depth(chain) is not None


def _shard_depth(chain: ChainName) -> int | None:
    """Return how many bits of the destination are the same in all of a shard, None if the chain is no shard."""
    found = _SHARD.fullmatch(chain.name) if chain.table in ("nat", "filter") else None
    if found is None:
        return None
    if found["low"]:
        return 16 - (int(found["high"]) - int(found["low"])).bit_length()
    return int(found["four"] or found["six"])


def port_hash(port_name: str, protocol: str, socket: str = "") -> str:
    """Return the 16 characters that end the name of a service port's or (with its `ip:port`) endpoint's chain.

    `port_name` is `namespace/name:port`; base32 of SHA-256, so that names fit the 28 characters of a chain name.
    """
    digest = sha256(f"{port_name}{protocol.lower()}{socket}".encode()).digest()
    return b32encode(digest[:10]).decode()


def deletion_order(chain: ChainName) -> int:
    """Return a sort key that puts shards and chains of service ports before those that they jump to."""
    depth = _shard_depth(chain)
    if depth is not None:
        return depth - _MOST_BITS - 1
    return next((rank for rank, prefix in enumerate(PORT_CHAIN_PREFIXES) if chain.name.startswith(prefix)), 0)
