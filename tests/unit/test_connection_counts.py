"""Connections to Services: totals for metrics, and counters in the output of iptables-save."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.app.connection_counts import ScrapedConnections
from kproxy.iptables.rule_counters import connection_counts
from kproxy.model.connection_counts import (
    OTHERS,
    ConnectionCounts,
    ConnectionTotals,
    Counts,
    CountsUnavailableError,
    Destination,
    ServicePortName,
    new_connections,
    parse_service_port,
)
from kproxy.model.types import Family
from tests.recordings import GOLDEN, SCENARIOS

V4 = Family.IPV4
NAMES = ("a/a", "a/b:http", "b/a")


def counts(**frontends: int) -> Counts:
    """Return the counts of Services in the namespace `ns`, each with one frontend."""
    found = {Destination(f"ns/{name}:http", f"{name}:80/TCP"): number for name, number in frontends.items()}
    return {V4: ConnectionCounts(found)}


def series(totals: ConnectionTotals) -> dict[str, int]:
    return {name.service: number for name, number in totals.series().items()}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("shop/web:http", ServicePortName("shop", "web", "http")),
        ("shop/web", ServicePortName("shop", "web", "")),
        ("shop/we...", ServicePortName("shop", "we...", "")),
    ],
)
def test_names_of_service_ports(text: str, name: ServicePortName) -> None:
    assert parse_service_port(text) == name
    assert str(name) == text


def test_new_connections_of_counters_that_started_again() -> None:
    assert new_connections({"a": 5, "b": 5, "gone": 9}, {"a": 7, "b": 2, "new": 3}) == {"a": 2, "b": 2, "new": 3}


def test_the_busiest_services_have_series_and_the_rest_is_summed() -> None:
    totals = ConnectionTotals(3)
    totals.update(counts(a=1, b=5, c=2, d=0))
    assert series(totals) == {"b": 5, "c": 2, "": 1}
    totals.update(counts(a=10, b=6, c=1, d=4))  # the counter of c started again
    assert series(totals) == {"b": 6, "c": 3, "": 14}


def test_a_new_service_replaces_a_removed_one_and_no_total_decreases() -> None:
    totals = ConnectionTotals(2)
    totals.update(counts(a=1, b=5))
    totals.update(counts(a=3))
    assert series(totals) == {"a": 2, "": 1}
    totals.update(counts(a=4))
    assert series(totals) == {"a": 3, "": 1}


def test_a_single_series_is_the_sum() -> None:
    totals = ConnectionTotals(1)
    totals.update(counts(a=1, b=5))
    assert totals.series() == {OTHERS: 6}


def test_both_families_are_added() -> None:
    totals = ConnectionTotals(5)
    totals.update({family: counts(a=2)[V4] for family in Family})
    assert series(totals) == {"a": 4}


@given(
    st.integers(1, 4),
    st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 20)), min_size=1, max_size=6),
)
def test_series_are_limited_and_never_decrease_while_a_service_exists(
    limit: int, readings: list[dict[str, int]]
) -> None:
    totals = ConnectionTotals(limit)
    before: dict[str, int] = {}
    for reading in readings:
        totals.update(counts(**reading))
        now = series(totals)
        assert len(now) <= limit
        assert all(now[name] >= before[name] for name in before.keys() & now.keys())
        assert "" not in before or "" in now
        before = now


# iptables


def counted(rules: str, packets: Callable[[str], int] = lambda _: 0) -> list[str]:
    """Return rules as `iptables-save -c` prints them. `packets` returns the number that a rule counted."""
    return [f"[{packets(line)}:0] {line}" if line.startswith("-A") else line for line in rules.splitlines()]


@pytest.mark.parametrize("program", ["iptables-save", "ip6tables-save"])
@pytest.mark.parametrize("comments", [True, False], ids=["small cluster", "large cluster"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_endpoint_of_a_recorded_cluster_is_found(scenario: str, program: str, comments: bool) -> None:
    rules = (GOLDEN / scenario / f"{program}.txt").read_text()
    expected = {
        Destination(match[1], match[2]): int(match[2].rpartition(":")[2])
        for match in re.finditer(r'-A KUBE-SEP-\S+ .*--comment "(\S+)".*--to-destination (\S+)', rules)
    }
    if not comments:
        rules = re.sub(r'(-A KUBE-(?:SVC|SVL|SEP)-.*?) -m comment --comment "[^"]*"', r"\1", rules)
    lines = counted(rules, lambda rule: int(rule.rpartition(":")[2]) if "--to-destination" in rule else 99)
    assert connection_counts(lines) == ConnectionCounts(endpoints=expected)


def test_shards_and_groups_of_endpoints_are_followed() -> None:
    rules = """\
-A KUBE-SERVICES -d 10.96.16.0/20 -j KUBE-SVC-10.96.16.0/20
-A KUBE-SVC-10.96.16.0/20 -d 10.96.16.1/32 -m comment --comment "shop/web cluster IP" -j KUBE-SVC-XRY76EGRC3BSCIIJ
-A KUBE-SVC-XRY76EGRC3BSCIIJ -j KUBE-SVC-XRY76EGRC3BSCIIJ_00
-A KUBE-SVC-XRY76EGRC3BSCIIJ -j KUBE-SVC-XRY76EGRC3BSCIIJ-00
-A KUBE-SVC-XRY76EGRC3BSCIIJ-00 -j KUBE-SEP-4R2DDHFYEWMX5YSX
-A KUBE-SEP-4R2DDHFYEWMX5YSX -p tcp -m tcp -j DNAT --to-destination 10.244.2.1:8080"""
    found = connection_counts(counted(rules, lambda rule: 7 * ("--to-destination" in rule)))
    assert found.endpoints == {Destination("shop/web", "10.244.2.1:8080"): 7}


def test_rules_of_others_are_ignored() -> None:
    rules = """\
-A POSTROUTING -j MASQUERADE
-A DOCKER -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80
-A KUBE-SEP-4R2DDHFYEWMX5YSX -p tcp -m tcp -j DNAT --to-destination 10.244.2.1:8080"""
    assert connection_counts(counted(rules)) == ConnectionCounts()


# Scrapes


def test_a_scrape_returns_what_has_just_been_read() -> None:
    numbers = iter((3, 8))
    scraped = ScrapedConnections(10, lambda: counts(a=next(numbers)), wait=60)
    name = ServicePortName("ns", "a", "http")
    assert [scraped(), scraped()] == [{name: 3}, {name: 8}]


def test_a_scrape_does_not_wait_for_a_slow_reading_and_starts_only_one() -> None:
    may_end, calls = threading.Event(), []

    def read() -> Counts:
        calls.append(1)
        may_end.wait(60)
        return counts(a=3)

    scraped = ScrapedConnections(10, read, wait=0.001)
    assert [scraped(), scraped()] == [{}, {}]
    may_end.set()
    scraped._wait = 60
    assert list(scraped().values()) == [3]
    assert len(calls) == 1


def test_counters_that_cannot_be_read_are_logged_once_and_keep_their_values(caplog: pytest.LogCaptureFixture) -> None:
    works = [True, False, False, True]

    def read() -> Counts:
        if not works.pop(0):
            raise CountsUnavailableError("no counters")
        return counts(a=3)

    scraped = ScrapedConnections(10, read, wait=60)
    assert [sum(scraped().values()) for _ in range(4)] == [3, 3, 3, 3]
    assert caplog.messages == ["kproxy.serviceConnectionMetrics: no counters"]
