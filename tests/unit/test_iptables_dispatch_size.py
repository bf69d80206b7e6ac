"""Dispatch chains with 10,000 destinations: rules that a packet traverses, and rules that a change rewrites."""

from __future__ import annotations

from random import Random

import pytest

from kproxy.iptables.dispatch import MAX_LEVELS, MAX_SHARD_RULES, lay_out
from kproxy.iptables.names import NAT_NODEPORTS, NAT_SERVICES
from kproxy.model.types import Family
from tests.unit.test_iptables_dispatch import BITS, TAIL, Traversal, specs, to_address, to_port, v4, v6

LARGE = 10_000
MAX_EVALUATED_RULES = 100
RANDOM = Random(7)

ADDRESSES = {
    "consecutive": (Family.IPV4, range(v4("10.96.0.0"), v4("10.96.0.0") + LARGE)),
    "in a /12": (Family.IPV4, [v4("10.96.0.0") + n for n in RANDOM.sample(range(1 << 20), LARGE)]),
    "in a /16": (Family.IPV4, [v4("172.30.0.0") + n for n in RANDOM.sample(range(1 << 16), LARGE)]),
    "random": (Family.IPV4, RANDOM.sample(range(1 << 32), LARGE)),
    "in a /108 of IPv6": (Family.IPV6, [v6("fd00:10:96::") + n for n in RANDOM.sample(range(1 << 20), LARGE)]),
    "one per /64 of IPv6": (
        Family.IPV6,
        [v6("2001:db8::1") + (n << 64) for n in RANDOM.sample(range(1 << 32), LARGE)],
    ),
}


@pytest.mark.parametrize("distribution", ADDRESSES)
def test_packet_traverses_few_rules(distribution: str) -> None:
    family, numbers = ADDRESSES[distribution]
    rules = [to_address(number, f"s{n}", family=family) for n, number in enumerate(numbers)]
    chains = lay_out(NAT_SERVICES, rules, TAIL, family, 1000).chains
    for rule in RANDOM.sample(rules, 300):
        traversal = Traversal(chains, NAT_SERVICES, rule.destination)
        assert traversal.hit == specs([rule])
        assert traversal.evaluated <= MAX_EVALUATED_RULES
    neighbors = [number ^ 1 << RANDOM.randrange(BITS[family]) for number in RANDOM.sample(sorted(numbers), 300)]
    for number in (*neighbors, 0, (1 << BITS[family]) - 1):
        assert Traversal(chains, NAT_SERVICES, number).evaluated <= MAX_EVALUATED_RULES


def test_packet_to_no_service_traverses_two_rules() -> None:
    family, numbers = ADDRESSES["in a /12"]
    chains = lay_out(NAT_SERVICES, [to_address(number) for number in numbers], TAIL, family, 1000).chains
    for address in ("10.244.1.7", "192.0.2.1", "8.8.8.8", "10.0.0.1"):
        assert Traversal(chains, NAT_SERVICES, v4(address)).evaluated == 2


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_packet_to_a_node_port_traverses_few_rules(protocol: str) -> None:
    rules = [to_port(number, protocol, f"s{number}") for number in range(30000, 30000 + LARGE)]
    chains = lay_out(NAT_NODEPORTS, rules, (), Family.IPV4, 1000).chains
    for rule in RANDOM.sample(rules, 300):
        traversal = Traversal(chains, NAT_NODEPORTS, rule.destination, protocol)
        assert traversal.hit == specs([rule])
        assert traversal.evaluated <= MAX_EVALUATED_RULES
    assert Traversal(chains, NAT_NODEPORTS, 443, protocol).evaluated <= 16


def test_no_choice_of_addresses_nests_shards_deeper_than_the_kernel_allows() -> None:
    """Otherwise a user who chooses addresses could make the kernel reject the rules of all Services."""
    nested = [1 << bit for bit in range(128)]
    rules = [to_address(number, family=Family.IPV6) for number in nested]
    chains = lay_out(NAT_SERVICES, rules, (), Family.IPV6, 1).chains
    levels = {Traversal(chains, NAT_SERVICES, number).levels for number in nested}
    assert max(levels) == MAX_LEVELS
    assert all(Traversal(chains, NAT_SERVICES, rule.destination).hit == specs([rule]) for rule in rules)


@pytest.mark.parametrize("distribution", ADDRESSES)
def test_added_destination_changes_or_splits_one_shard(distribution: str) -> None:
    family, numbers = ADDRESSES[distribution]
    used = set(numbers)
    rules = [to_address(number, family=family) for number in numbers]
    before = lay_out(NAT_SERVICES, rules, TAIL, family, 1000).chains
    for number in RANDOM.sample(sorted(used), 20):
        new = next(item for item in range(number, number + LARGE + 1) if item not in used)
        after = lay_out(NAT_SERVICES, [*rules, to_address(new, family=family)], TAIL, family, 1000).chains
        touched = [chain for chain in before.keys() | after.keys() if before.get(chain) != after.get(chain)]
        assert len(touched) <= 8
        assert sum(after.get(chain, "").count("\n") + 1 for chain in touched) <= 4 * MAX_SHARD_RULES
