"""Lay out a dispatch chain: flat as in kube-proxy, or split into shards by destination. Pure.

Dispatch chains are shared by all Services and match the destinations of packets. In a flat chain, the kernel checks
every new connection on the node against one rule for each Service, even if the connection is not addressed to any
Service. The shards of a split chain are smaller chains, each for a subset of the destinations. The layout depends only
on the current rules, not on earlier layouts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from msgspec import Struct

from kproxy.iptables.names import SHARD_PREFIXES, ChainName, network_shard_suffix, port_shard_suffix
from kproxy.iptables.render import DispatchRule
from kproxy.model.types import Family

DISPATCH_THRESHOLD = 1000
"""Maximum number of service rules in a flat dispatch chain. A chain with more service rules is split.

Measured with iptables-nft: the kernel checks a new connection against 60 rules per microsecond.
"""
MAX_SHARD_RULES = 32
"""Maximum number of rules in a shard. Shards for only one destination and shards at the last level may have more."""
LEVEL_BITS = 4
"""Number of bits of the destination that each level of the tree examines. A shard jumps to at most 16 other shards."""
MAX_LEVELS = 8
"""Maximum depth of the tree of shards. Maliciously chosen IPv4 addresses can require all levels.

nf_tables allows 15 nested jumps (NFT_JUMP_STACK_SIZE). At most 15 are used: one jump to KUBE-SERVICES, one jump for
each level of shards, and six jumps through a KUBE-FW chain and a group of endpoints to KUBE-MARK-MASQ.
"""
PROTOCOLS = ("tcp", "udp", "sctp")


class DispatchLayout(Struct, frozen=True):
    """The chains that implement a dispatch chain, with their rules.

    Each chain precedes the chains that jump to it, so the dispatch chain itself comes last. `non_service_rules` is the
    number of rules that do not belong to a Service: the jumps to shards and the trailing rules.
    """

    chains: dict[ChainName, str]
    non_service_rules: int


def lay_out(
    chain: ChainName, rules: Sequence[DispatchRule], trailing_rules: Sequence[str], family: Family, threshold: int
) -> DispatchLayout:
    """Return the layout of a dispatch chain with these rules, followed by the trailing rules.

    The chain is split into a tree of shards if it has more than `threshold` rules and `threshold` is not 0. Rules for
    the same destination keep their order. In a split chain, rules for addresses come before rules for ports of the
    node.

    A shard is named after the destinations whose packets reach it, and contains all rules for these destinations. This
    makes it safe to replace the chains of an old tree one by one from the bottom up: at any time, a packet traverses
    either all old or all new rules for its destination.
    """
    if not threshold or len(rules) <= threshold:
        text = "\n".join([*(rule.rule for rule in rules), *trailing_rules])
        return DispatchLayout({chain: text}, len(trailing_rules))
    jumps: list[str] = []
    chains: dict[ChainName, str] = {}
    for protocol in ("", *PROTOCOLS):
        space = _PortSpace(protocol) if protocol else _AddressSpace(family)
        matching = (rule for rule in rules if rule.protocol == protocol)
        tree = _ShardTree(chain, space, matching, min(threshold, MAX_SHARD_RULES))
        jumps += tree.jumps
        chains |= tree.chains
    chains[chain] = "\n".join([*jumps, *trailing_rules])
    total = sum(text.count("\n") + 1 for text in chains.values())
    return DispatchLayout(chains, total - len(rules))


class _DestinationSpace(Protocol):
    """Destinations as integers of `bits` bits.

    A block is an aligned range: all destinations that differ only in their last `free_bits` bits.
    """

    bits: int

    def shard_suffix(self, destination: int, free_bits: int) -> str:
        """Return the name suffix of the shard for the block that contains `destination`."""

    def match(self, destination: int, free_bits: int) -> str:
        """Return the match of an iptables rule for the block that contains `destination`."""


class _AddressSpace:
    def __init__(self, family: Family) -> None:
        is_ipv6 = family is Family.IPV6
        self.bits = 128 if is_ipv6 else 32
        self._address = IPv6Address if is_ipv6 else IPv4Address

    def _network(self, destination: int, free_bits: int) -> str:
        return f"{self._address(destination >> free_bits << free_bits)}/{self.bits - free_bits}"

    def shard_suffix(self, destination: int, free_bits: int) -> str:
        return network_shard_suffix(self._network(destination, free_bits))

    def match(self, destination: int, free_bits: int) -> str:
        return f"-d {self._network(destination, free_bits)}"


class _PortSpace:
    bits = 16

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol

    def _range(self, destination: int, free_bits: int) -> tuple[int, int]:
        low = destination >> free_bits << free_bits
        return low, low + (1 << free_bits) - 1

    def shard_suffix(self, destination: int, free_bits: int) -> str:
        return port_shard_suffix(self._protocol, *self._range(destination, free_bits))

    def match(self, destination: int, free_bits: int) -> str:
        low, high = self._range(destination, free_bits)
        ports = f"{low}:{high}" if free_bits else f"{low}"
        return f"-p {self._protocol} -m {self._protocol} --dport {ports}"


class _ShardTree:
    """The shards of one destination space.

    `chains` are the shards from the bottom up. `jumps` are the rules of the dispatch chain that jump to the top-level
    shards.
    """

    def __init__(
        self, dispatch_chain: ChainName, space: _DestinationSpace, rules: Iterable[DispatchRule], max_shard_rules: int
    ) -> None:
        self._dispatch_chain = dispatch_chain
        self._space = space
        self._max_shard_rules = max_shard_rules
        self._rules = sorted(rules, key=lambda rule: rule.destination)
        self._destinations = [rule.destination for rule in self._rules]
        self.chains: dict[ChainName, str] = {}
        self.jumps = self._add_shards(dispatch_chain.name, 0, len(self._rules), space.bits, level=1)

    def _add_shards(self, name: str, first: int, last: int, free_bits: int, level: int) -> list[str]:
        """Add the shards for the rules with indexes in `[first, last)`, whose destinations are in one block.

        Return the rules of the chain `name` that jump to the shards.
        """
        return [
            f"-A {name} {self._add_shard(start, end, level)}"
            for start, end in self._split(first, last, free_bits, free_bits - LEVEL_BITS)
        ]

    def _split(self, first: int, last: int, free_bits: int, min_free_bits: int) -> Iterator[tuple[int, int]]:
        """Split the rules with indexes in `[first, last)` into shards, and yield the range of indexes of each shard.

        The destinations of the rules are in one block with `free_bits` free bits. The block is halved repeatedly until
        the rules of each part fit into a shard or the part has only `min_free_bits` free bits. The block of all
        destinations is always halved, because `iptables-save` does not print a match for all destinations.
        """
        if first == last:
            return
        fits = last - first <= self._max_shard_rules and free_bits < self._space.bits
        if fits or free_bits == min_free_bits:
            yield first, last
            return
        middle = (self._destinations[first] >> free_bits << free_bits) + (1 << free_bits - 1)
        cut = bisect_left(self._destinations, middle, first, last)
        yield from self._split(first, cut, free_bits - 1, min_free_bits)
        yield from self._split(cut, last, free_bits - 1, min_free_bits)

    def _add_shard(self, first: int, last: int, level: int) -> str:
        """Add the shard for the rules with indexes in `[first, last)`.

        Return the match and the jump of the rule that leads to the shard. This rule matches the smallest block that
        contains all destinations of the shard. If the shard is itself split, its block is enlarged until the number of
        free bits is a multiple of `LEVEL_BITS`.
        """
        destination = self._destinations[first]
        free_bits = (destination ^ self._destinations[last - 1]).bit_length()
        is_leaf = last - first <= self._max_shard_rules or not free_bits or level == MAX_LEVELS
        if not is_leaf:
            free_bits += -free_bits % LEVEL_BITS
        name = SHARD_PREFIXES[self._dispatch_chain] + self._space.shard_suffix(destination, free_bits)
        if is_leaf:
            start = len(f"-A {self._dispatch_chain.name} ")
            rules = [f"-A {name} {rule.rule[start:]}" for rule in self._rules[first:last]]
        else:
            rules = self._add_shards(name, first, last, free_bits, level + 1)
        self.chains[ChainName(self._dispatch_chain.table, name)] = "\n".join(rules)
        return f"{self._space.match(destination, free_bits)} -j {name}"
