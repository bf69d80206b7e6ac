"""Shared chains select every endpoint with nearly equal probability, also while the number of endpoints changes."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

from kproxy.model.context import Context
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import NODE_PORT_KEY
from kproxy.nftables.ruleset import DnatMap
from kproxy.nftables.shared_chains import MAX_IMBALANCE, SharedChain, any_chain_name, chain_capacity, numgen_moduli

MAX_ENDPOINTS = 5_000
CHANGING_COUNTS = (*range(1, 50), 100, 1_000, 5_000)


def selection_probabilities(moduli: tuple[int, ...], endpoints: int) -> tuple[list[tuple[int, Fraction]], Fraction]:
    """Return the probability of each endpoint and the probability that no rule selects one.

    Equally likely endpoints are grouped, in index order: each group is its size and the probability of one endpoint.
    A rule runs only if the rules before it selected no endpoint.
    """
    missed = Fraction(1)
    rules: list[tuple[int, Fraction]] = []
    for modulus in moduli:
        selectable = min(modulus, endpoints)
        rules.append((selectable, missed / modulus))
        missed *= Fraction(modulus - selectable, modulus)
    ends = sorted({selectable for selectable, _ in rules})
    begins = [0, *ends[:-1]]
    groups = [
        (end - begin, sum((probability for selectable, probability in rules if selectable >= end), Fraction()))
        for begin, end in zip(begins, ends, strict=True)
    ]
    return groups, missed


def test_selection_probabilities() -> None:
    half, third, quarter, eighth = (Fraction(1, number) for number in (2, 3, 4, 8))
    assert selection_probabilities((2, 1), 1) == ([(1, 2 * half)], Fraction())
    assert selection_probabilities((3,), 2) == ([(2, third)], third)
    assert selection_probabilities((4, 2), 3) == ([(2, quarter + eighth), (1, quarter)], Fraction())


def test_every_endpoint_is_about_equally_likely_for_any_number_of_endpoints() -> None:
    for endpoints in range(1, MAX_ENDPOINTS + 1):
        groups, missed = selection_probabilities(numgen_moduli(chain_capacity(endpoints)), endpoints)
        assert missed == 0
        assert sum(size for size, _ in groups) == endpoints
        for size, probability in groups:
            assert not size or abs(probability * endpoints - 1) <= MAX_IMBALANCE, endpoints


def test_endpoints_of_a_chain_at_capacity_are_exactly_equally_likely() -> None:
    for capacity in {chain_capacity(endpoints) for endpoints in range(1, MAX_ENDPOINTS + 1)}:
        groups, missed = selection_probabilities(numgen_moduli(capacity), capacity)
        assert {probability for _, probability in groups} - {Fraction()} == {Fraction(1, capacity)}
        assert missed == 0


def test_packets_in_flight_reach_an_endpoint_while_the_number_of_endpoints_changes() -> None:
    for old, new in product(CHANGING_COUNTS, CHANGING_COUNTS):
        assert selection_probabilities(numgen_moduli(chain_capacity(old)), new)[1] == 0, (old, new)


def test_there_are_few_chain_capacities() -> None:
    capacities = {chain_capacity(endpoints) for endpoints in range(1, MAX_ENDPOINTS + 1)}
    assert sorted(capacities)[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert len(capacities) <= 26
    assert all(chain_capacity(endpoints) >= endpoints for endpoints in range(1, MAX_ENDPOINTS + 1))
    assert max(len(numgen_moduli(capacity)) for capacity in capacities) <= 8


def test_chain_has_one_rule_for_each_modulus() -> None:
    shared = SharedChain.parse(any_chain_name("nodeport", 5))
    assert shared is not None
    rules = shared.render(Context(Family.IPV4, "node-1")).rules
    assert [rule.statements for rule in rules] == [
        (DnatMap(NODE_PORT_KEY, modulus, names.NODE_PORT_ENDPOINTS),) for modulus in numgen_moduli(6)
    ]
