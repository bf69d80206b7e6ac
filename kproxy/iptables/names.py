"""Names of iptables chains. They are those of kube-proxy, because administrators and other tools rely on them. Pure."""

from __future__ import annotations

import re
from base64 import b32encode
from hashlib import sha256
from typing import NamedTuple


class ChainName(NamedTuple):
    """A chain, identified by its table and name."""

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
DISPATCH_CHAINS = (
    NAT_SERVICES,
    NAT_NODEPORTS,
    FILTER_SERVICES,
    FILTER_EXTERNAL_SERVICES,
    FILTER_NODEPORTS,
    FILTER_PROXY_FIREWALL,
)
"""The dispatch chains: they match a packet's destination. Each service port adds rules to some of them."""
CANARIES = tuple(ChainName(table, "KUBE-PROXY-CANARY") for table in ("mangle", "nat", "filter"))
"""Empty chains whose absence shows that another process flushed a table."""
PORT_CHAIN_PREFIXES = ("KUBE-XLB-", "KUBE-FW-", "KUBE-EXT-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-")
"""Name prefixes of per-Service chains. Each of these chains belongs to one service port and is in table nat.

A chain jumps only to chains whose prefix is further to the right. KUBE-XLB- was used by kube-proxy before 1.24.
"""
SHARD_PREFIXES = {
    NAT_SERVICES: "KUBE-SVC-",
    NAT_NODEPORTS: "KUBE-EXT-",
    FILTER_SERVICES: "KUBE-SVC-",
    FILTER_EXTERNAL_SERVICES: "KUBE-EXT-",
    FILTER_NODEPORTS: "KUBE-SVL-",
    FILTER_PROXY_FIREWALL: "KUBE-FW-",
}
"""Name prefixes of the shards of each dispatch chain. A shard is named, for example, `KUBE-SVC-10.96.16.0/20`.

With these prefixes, kube-proxy can take over from kproxy: it deletes unused chains in table nat that have one of them.
A shard that kube-proxy did not recognize would still jump to a per-Service chain, which could then not be deleted.
"""
_MAX_ADDRESS_BITS = 128
_SHARD = re.compile(
    r"KUBE-(?:SVC|EXT|SVL|FW)-"
    r"(?:(?:\d+\.){3}\d+/(?P<ipv4_prefix>\d+)|[A-Z2-7]{15}/(?P<ipv6_prefix>\d+)|(?:tcp|udp|sctp)-(?P<low>\d+)-(?P<high>\d+))"
)


def network_shard_suffix(network: str) -> str:
    """Return the name suffix of the shard for a network: `address/length`, where a hash replaces an IPv6 address."""
    address, _, length = network.partition("/")
    return f"{b32encode(sha256(address.encode()).digest()).decode()[:15]}/{length}" if ":" in address else network


def port_shard_suffix(protocol: str, low: int, high: int) -> str:
    """Return the name suffix of the shard for a range of NodePorts."""
    return f"{protocol}-{low}-{high}"


def is_shard(chain: ChainName) -> bool:
    """Return whether a chain is a shard of a dispatch chain."""
    return _shard_depth(chain) is not None


def _shard_depth(chain: ChainName) -> int | None:
    """Return the prefix length of a shard's destinations in bits, or None if the chain is not a shard."""
    match = _SHARD.fullmatch(chain.name) if chain.table in ("nat", "filter") else None
    if match is None:
        return None
    if match["low"]:
        return 16 - (int(match["high"]) - int(match["low"])).bit_length()
    return int(match["ipv4_prefix"] or match["ipv6_prefix"])


def port_hash(port_name: str, protocol: str, endpoint: str = "") -> str:
    """Return the 16-character suffix in the names of a service port's chains, or of the chain of one `endpoint`.

    `port_name` is `namespace/name:port`, `endpoint` is `IP:port`. As in kube-proxy, the suffix is the start of the
    SHA-256 digest in base32: a chain name has at most 28 characters.
    """
    digest = sha256(f"{port_name}{protocol.lower()}{endpoint}".encode()).digest()
    return b32encode(digest[:10]).decode()


def deletion_order(chain: ChainName) -> int:
    """Return a sort key that orders shards and per-Service chains before the chains that they jump to."""
    depth = _shard_depth(chain)
    if depth is not None:
        return depth - _MAX_ADDRESS_BITS - 1
    return next((rank for rank, prefix in enumerate(PORT_CHAIN_PREFIXES) if chain.name.startswith(prefix)), 0)
