"""Every endpoint has the same chance, and whoever comes while their number changes finds one."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

from kproxy.model.context import Context
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import NODE_PORT_KEY
from kproxy.nftables.ruleset import DnatMap
from kproxy.nftables.shared_chains import MAX_IMBALANCE, SharedChain, any_chain_name, chain_capacity, numgen_moduli

MOST = 5_000
NUMBERS = (*range(1, 50), 100, 1_000, 5_000)


def chances(drawn_below: tuple[int, ...], endpoints: int) -> tuple[list[tuple[int, Fraction]], Fraction]:
    """How likely each endpoint is, as runs of endpoints that are equally likely, and how likely none is.

    The draws are made one after the other, each only if those before found nothing.
    """
    missed = Fraction(1)
    weights: list[tuple[int, Fraction]] = []
    for below in drawn_below:
        within = min(below, endpoints)
        weights.append((within, missed / below))
        missed *= Fraction(below - within, below)
    ends = sorted({within for within, _ in weights})
    begins = [0, *ends[:-1]]
    runs = [
        (end - begin, sum((share for within, share in weights if within >= end), Fraction()))
        for begin, end in zip(begins, ends, strict=True)
    ]
    return runs, missed


def test_what_a_run_of_draws_comes_to() -> None:
    half, third, quarter, eighth = (Fraction(1, number) for number in (2, 3, 4, 8))
    assert chances((2, 1), 1) == ([(1, 2 * half)], Fraction())
    assert chances((3,), 2) == ([(2, third)], third)
    assert chances((4, 2), 3) == ([(2, quarter + eighth), (1, quarter)], Fraction())


def test_every_endpoint_has_the_same_chance_whatever_their_number() -> None:
    for endpoints in range(1, MOST + 1):
        runs, missed = chances(numgen_moduli(chain_capacity(endpoints)), endpoints)
        assert missed == 0
        assert sum(count for count, _ in runs) == endpoints
        for count, chance in runs:
            assert not count or abs(chance * endpoints - 1) <= MAX_IMBALANCE, endpoints


def test_numbers_of_endpoints_that_fill_a_chain_have_exactly_even_chances() -> None:
    for size in {chain_capacity(endpoints) for endpoints in range(1, MOST + 1)}:
        runs, missed = chances(numgen_moduli(size), size)
        assert {chance for _, chance in runs} - {Fraction()} == {Fraction(1, size)}
        assert missed == 0


def test_a_packet_on_its_way_finds_an_endpoint_while_their_number_changes() -> None:
    for old, new in product(NUMBERS, NUMBERS):
        assert chances(numgen_moduli(chain_capacity(old)), new)[1] == 0, (old, new)


def test_sizes_are_few() -> None:
    sizes = {chain_capacity(endpoints) for endpoints in range(1, MOST + 1)}
    assert sorted(sizes)[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert len(sizes) <= 26
    assert all(chain_capacity(endpoints) >= endpoints for endpoints in range(1, MOST + 1))
    assert max(len(numgen_moduli(size)) for size in sizes) <= 8


def test_the_chain_of_a_number_of_endpoints_makes_its_draws() -> None:
    shared = SharedChain.parse(any_chain_name("nodeport", 5))
    assert shared is not None
    rules = shared.render(Context(Family.IPV4, "node-1")).rules
    assert [rule.statements for rule in rules] == [
        (DnatMap(NODE_PORT_KEY, below, names.NODE_PORT_ENDPOINTS),) for below in numgen_moduli(6)
    ]
