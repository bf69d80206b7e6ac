"""How a dispatch chain is laid out: flat like kube-proxy's, or as a tree by destination. Pure.

In a flat chain every new connection on the node passes one rule for each Service, also one that goes to none.
The tree is a function of the present destinations and of nothing that was before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from msgspec import Struct

from kproxy.iptables.names import SHARD_STEMS, ChainName, network_label, ports_label
from kproxy.iptables.render import DispatchRule
from kproxy.model.types import Family

DISPATCH_THRESHOLD = 1000
"""How many rules of Services a dispatch chain may hold before it is split.

Measured with iptables-nft: a new connection passes 60 rules in a microsecond.
"""
SHARD_RULES = 32
"""How many rules a shard may hold. More only where they are about one destination, or at the lowest level."""
STRIDE = 4
"""How many bits of a destination one level of the tree tells apart, so that there are at most 16 ways on."""
LEVELS = 8
"""How many shards a packet passes at most: all of them are needed for IPv4, if addresses are chosen against us.

nf_tables follows 15 jumps; to KUBE-SERVICES it is one, and from there by a source range to KUBE-MARK-MASQ five.
"""
PROTOCOLS = ("tcp", "udp", "sctp")


class DispatchLayout(Struct, frozen=True):
    """The chains that make up a dispatch chain, with their rules.

    Each stands before those that jump to it, so the dispatch chain itself is last. `own` is how many of the rules are
    of no Service.
    """

    chains: dict[ChainName, str]
    own: int


def lay_out(
    chain: ChainName, rules: Sequence[DispatchRule], tail: Sequence[str], family: Family, threshold: int
) -> DispatchLayout:
    """Return the layout of a dispatch chain that holds these rules and ends with the tail.

    It is a tree if there are more than `threshold` rules, and `threshold` is not 0. Rules about one destination keep
    their order; those about an address come before those about a port of the node, and the tail comes last.

    A chain of the tree is called after the destinations that lead to it, and holds all rules about these. So while the
    chains of a new tree replace those of an old one, one by one from the bottom, every packet finds all rules about its
    destination, be it those that were or those that will be.
    """
    if not threshold or len(rules) <= threshold:
        return DispatchLayout({chain: "\n".join([*(each.rule for each in rules), *tail])}, len(tail))
    jumps: list[str] = []
    chains: dict[ChainName, str] = {}
    for protocol in ("", *PROTOCOLS):
        space = _PortSpace(protocol) if protocol else _AddressSpace(family)
        concerned = (each for each in rules if each.protocol == protocol)
        split = _ShardTree(chain, space, concerned, min(threshold, SHARD_RULES))
        jumps += split.jumps
        chains |= split.chains
    chains[chain] = "\n".join([*jumps, *tail])
    written = sum(text.count("\n") + 1 for text in chains.values())
    return DispatchLayout(chains, written - len(rules))


class _DestinationSpace(Protocol):
    """Destinations, as numbers of `bits` bits. A block of them agrees in all but the last `free` bits."""

    bits: int

    def label(self, place: int, free: int) -> str:
        """Return what the name of the shard ends with that the block of `place` has."""

    def match(self, place: int, free: int) -> str:
        """Return what matches the block of `place`."""


class _AddressSpace:
    def __init__(self, family: Family) -> None:
        six = family is Family.IPV6
        self.bits = 128 if six else 32
        self._address = IPv6Address if six else IPv4Address

    def _network(self, place: int, free: int) -> str:
        return f"{self._address(place >> free << free)}/{self.bits - free}"

    def label(self, place: int, free: int) -> str:
        return network_label(self._network(place, free))

    def match(self, place: int, free: int) -> str:
        return f"-d {self._network(place, free)}"


class _PortSpace:
    bits = 16

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol

    def _range(self, place: int, free: int) -> tuple[int, int]:
        low = place >> free << free
        return low, low + (1 << free) - 1

    def label(self, place: int, free: int) -> str:
        return ports_label(self._protocol, *self._range(place, free))

    def match(self, place: int, free: int) -> str:
        low, high = self._range(place, free)
        ports = f"{low}:{high}" if free else f"{low}"
        return f"-p {self._protocol} -m {self._protocol} --dport {ports}"


class _ShardTree:
    """The tree of one kind of destination: `jumps` are the rules that lead into it, `chains` are bottom-up."""

    def __init__(
        self, owner: ChainName, space: _DestinationSpace, rules: Iterable[DispatchRule], shard_rules: int
    ) -> None:
        self._owner = owner
        self._space = space
        self._shard_rules = shard_rules
        self._rules = sorted(rules, key=lambda rule: rule.place)
        self._places = [rule.place for rule in self._rules]
        self.chains: dict[ChainName, str] = {}
        self.jumps = self._jumps(owner.name, 0, len(self._rules), space.bits, level=1)

    def _jumps(self, name: str, first: int, last: int, free: int, level: int) -> list[str]:
        """Return the rules of a chain that tells apart what its rules, `first` to before `last`, agree in no more.

        The chains that these jump to are written on the way.
        """
        return [
            f"-A {name} {self._shard(start, end, level)}"
            for start, end in self._parts(first, last, free, free - STRIDE)
        ]

    def _parts(self, first: int, last: int, free: int, least: int) -> Iterator[tuple[int, int]]:
        """Cut rules that agree in all but `free` bits in halves of their block, until they fit into a shard.

        They are not cut finer than blocks of `least` bits. The block of all destinations is always cut: what matches
        everything is not printed.
        """
        if first == last:
            return
        fits = last - first <= self._shard_rules and free < self._space.bits
        if fits or free == least:
            yield first, last
            return
        middle = (self._places[first] >> free << free) + (1 << free - 1)
        cut = bisect_left(self._places, middle, first, last)
        yield from self._parts(first, cut, free - 1, least)
        yield from self._parts(cut, last, free - 1, least)

    def _shard(self, first: int, last: int, level: int) -> str:
        """Write the shard of these rules; return what leads to it, a match of the smallest block that has them all."""
        place = self._places[first]
        free = (place ^ self._places[last - 1]).bit_length()
        is_leaf = last - first <= self._shard_rules or not free or level == LEVELS
        if not is_leaf:
            free += -free % STRIDE
        name = SHARD_STEMS[self._owner] + self._space.label(place, free)
        if is_leaf:
            start = len(f"-A {self._owner.name} ")
            rules = [f"-A {name} {rule.rule[start:]}" for rule in self._rules[first:last]]
        else:
            rules = self._jumps(name, first, last, free, level + 1)
        self.chains[ChainName(self._owner.table, name)] = "\n".join(rules)
        return f"{self._space.match(place, free)} -j {name}"
