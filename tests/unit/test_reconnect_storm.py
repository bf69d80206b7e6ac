"""Thousands of nodes come back after an outage of their API server: spread over time, and without complete lists."""

from __future__ import annotations

import pytest

from tests.api_cost.storm import KINDS, SCENARIOS, Scenario, Storm, histogram, simulate

NODES = 5000
WATCHED = KINDS[:2]
FAILOVER, RESTART, CLEAN_RESTART, OVERLOADED = SCENARIOS


@pytest.fixture(scope="module")
def storms() -> dict[str, Storm]:
    """Every scenario with the watches of Services and EndpointSlices of 5,000 nodes."""
    return {each.name: simulate(each, nodes=NODES, kinds=WATCHED, seed=20) for each in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_watches_resume_without_lists(storms: dict[str, Storm], scenario: Scenario) -> None:
    storm = storms[scenario.name]
    assert storm.clients == NODES * len(WATCHED)
    assert sum(storm.accepted.values()) == storm.clients
    assert storm.lists == 0


@pytest.mark.parametrize("scenario", [RESTART, CLEAN_RESTART], ids=lambda scenario: scenario.name)
def test_clients_come_back_spread_over_time_after_a_restart(storms: dict[str, Storm], scenario: Scenario) -> None:
    storm = storms[scenario.name]
    assert storm.share < 0.1
    assert len([count for count in storm.accepted.values() if count > 0.01 * storm.clients]) > 10
    assert storm.recovered < scenario.seconds + 30.0  # the longest pause between two attempts


def test_clients_that_are_asked_to_wait_for_the_same_time_come_back_spread_over_time(storms: dict[str, Storm]) -> None:
    storm = storms[OVERLOADED.name]
    assert storm.share < 0.25
    assert storm.requests[10] < storm.clients / 4


def test_clients_move_to_another_server_within_a_second(storms: dict[str, Storm]) -> None:
    storm = storms[FAILOVER.name]
    assert storm.recovered < 1.0
    assert sum(storm.requests.values()) == storm.clients


def test_refused_requests_are_counted() -> None:
    storm = simulate(RESTART, nodes=10, seed=1)
    assert sum(storm.requests.values()) > sum(storm.accepted.values()) == 10 * len(KINDS)
    assert all(second >= RESTART.seconds for second in storm.accepted)


def test_clients_with_the_same_delays_would_be_a_herd() -> None:
    class Constant:
        def random(self) -> float:
            return 0.5

    storm = simulate(RESTART, nodes=10, random=Constant().random)
    assert storm.share == 1.0


def test_histogram_shows_each_second_with_requests() -> None:
    storm = simulate(OVERLOADED, nodes=10, seed=1)
    lines = list(histogram(storm))
    assert len(lines) == len(storm.requests)
    assert lines[0].split() == ["0", "s", "40", "0", "." * 50]
    assert any("#" in line for line in lines[1:])
