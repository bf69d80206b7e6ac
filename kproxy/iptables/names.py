"""Names of iptables chains. Pure.

Except for the names of shards, they are the same as in kube-proxy, because administrators and other tools rely on them.
"""

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
"""The dispatch chains, which match the destinations of packets. Each service port adds rules to some of them."""
INVALID_COUNTER = "ct_state_invalid_dropped_pkts"
"""The nfacct counter of dropped packets in conntrack state INVALID."""
LOCALHOST_COUNTER = "localhost_nps_accepted_pkts"
"""The nfacct counter of packets to NodePorts on 127.0.0.0/8."""
CANARIES = tuple(ChainName(table, "KUBE-PROXY-CANARY") for table in ("mangle", "nat", "filter"))
"""Empty chains. If one of them is missing, another process has deleted all chains of its table."""
PORT_CHAIN_PREFIXES = ("KUBE-FW-", "KUBE-XLB-", "KUBE-EXT-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-")
"""Name prefixes of per-Service chains. Each of these chains belongs to one service port and is in table nat.

They jump to KUBE-MARK-MASQ and otherwise only to chains whose prefix comes later in this tuple, or to the chains of
groups of endpoints, which have the name of the chain with a suffix. kube-proxy used KUBE-XLB- before version 1.24.
"""
SHARED_CHAINS = frozenset((*DISPATCH_CHAINS, *CANARIES, FILTER_FORWARD, FILTER_FIREWALL, MARK_MASQ, POSTROUTING))
"""All chains of kproxy that neither belong to a Service nor are shards."""
SHARD_PREFIXES = {
    NAT_SERVICES: "KUBE-SVC-",
    NAT_NODEPORTS: "KUBE-EXT-",
    FILTER_SERVICES: "KUBE-SVC-",
    FILTER_EXTERNAL_SERVICES: "KUBE-EXT-",
    FILTER_NODEPORTS: "KUBE-SVL-",
    FILTER_PROXY_FIREWALL: "KUBE-FW-",
}
"""Name prefixes of the shards of each dispatch chain. A shard is named, for example, `KUBE-SVC-10.96.16.0/20`.

These prefixes allow kube-proxy to replace kproxy, because kube-proxy deletes unused chains in table nat whose names
have one of these prefixes. If kube-proxy did not delete a shard, the per-Service chains to which the shard jumps would
remain in use, and kube-proxy could not delete them.
"""
_MAX_ADDRESS_BITS = 128
_GROUP_NAME_LENGTH = 28
_SHARD = re.compile(
    r"KUBE-(?:SVC|EXT|SVL|FW)-"
    r"(?:(?:\d+\.){3}\d+/(?P<ipv4_prefix>\d+)|[A-Z2-7]{15}/(?P<ipv6_prefix>\d+)|(?:tcp|udp|sctp)-(?P<low>\d+)-(?P<high>\d+))"
)


def network_shard_suffix(network: str) -> str:
    """Return the name suffix of the shard for a network: `address/length`, with a hash instead of an IPv6 address."""
    address, _, length = network.partition("/")
    return f"{b32encode(sha256(address.encode()).digest()).decode()[:15]}/{length}" if ":" in address else network


def port_shard_suffix(protocol: str, low: int, high: int) -> str:
    """Return the name suffix of the shard for a range of NodePorts."""
    return f"{protocol}-{low}-{high}"


def is_shard(chain: ChainName) -> bool:
    """Return whether a chain is a shard of a dispatch chain."""
    return _shard_depth(chain) is not None


def is_own(chain: ChainName) -> bool:
    """Return whether a chain has a name that kproxy or kube-proxy gives to its chains in this table.

    Other tools also use names that begin with `KUBE-`: for example, kube-router has `KUBE-POD-FW-` chains.
    """
    is_per_service = chain.table == "nat" and chain.name.startswith(PORT_CHAIN_PREFIXES)
    return chain in SHARED_CHAINS or is_per_service or is_shard(chain)


def _shard_depth(chain: ChainName) -> int | None:
    """Return the length in bits of the prefix that a shard's destinations share, or None for any other chain."""
    match = _SHARD.fullmatch(chain.name) if chain.table in ("nat", "filter") else None
    if match is None:
        return None
    if match["low"]:
        return 16 - (int(match["high"]) - int(match["low"])).bit_length()
    return int(match["ipv4_prefix"] or match["ipv6_prefix"])


def port_hash(port_name: str, protocol: str, endpoint: str = "") -> str:
    """Return the 16-character suffix of the names of a service port's chains.

    With an `endpoint`, return the suffix of the name of that endpoint's chain. `port_name` is `namespace/name:port`,
    and `endpoint` is `IP:port`. As in kube-proxy, the suffix is the start of a SHA-256 digest in base32. It is not the
    whole digest, because a chain name has at most 28 characters.
    """
    digest = sha256(f"{port_name}{protocol.lower()}{endpoint}".encode()).digest()
    return b32encode(digest[:10]).decode()


def group_chain(chain: str, group: int, *, affinity: bool = False) -> str:
    """Return the name of the chain to which a KUBE-SVC or KUBE-SVL chain jumps for one group of its endpoints.

    With `affinity`, return the name of the chain that checks the session affinity to these endpoints. The name has the
    maximum length of 28 characters, so `group` is at most 255.
    """
    return f"{chain}{'_' if affinity else '-'}{group:02x}"


def _is_group(name: str) -> bool:
    return len(name) == _GROUP_NAME_LENGTH and name[-3] in "_-"


def deletion_order(chain: ChainName) -> int:
    """Return a sort key that puts each shard and each per-Service chain before the chains that it jumps to."""
    depth = _shard_depth(chain)
    if depth is not None:
        return depth - _MAX_ADDRESS_BITS - 1
    ranks = (2 * rank for rank, prefix in enumerate(PORT_CHAIN_PREFIXES) if chain.name.startswith(prefix))
    return next(ranks, 0) + _is_group(chain.name)
