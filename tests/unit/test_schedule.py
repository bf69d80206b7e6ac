"""When pending changes are synced, on a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.sync.schedule import FIRST_RETRY_SECONDS, Schedule


@pytest.fixture
def schedule() -> Schedule:
    """A schedule with at most one sync per second and at most 8 seconds between retries."""
    return Schedule(min_interval=1.0, max_retry=8.0)


def test_no_sync_is_due_without_a_request(schedule: Schedule) -> None:
    assert schedule.wait(0.0) is None
    assert schedule.wait(1e9) is None


@pytest.mark.parametrize("now", [-5.0, 0.0, 1e9])
def test_first_change_is_synced_at_once(schedule: Schedule, now: float) -> None:
    schedule.request()
    assert schedule.wait(now) == 0.0


def test_change_after_a_sync_waits_for_the_rest_of_the_interval(schedule: Schedule) -> None:
    schedule.request()
    schedule.started(10.0)
    schedule.succeeded()
    assert schedule.wait(10.0) is None
    schedule.request()
    assert schedule.wait(10.25) == 0.75
    schedule.request()
    assert schedule.wait(10.5) == 0.5
    assert schedule.wait(11.0) == 0.0
    assert schedule.wait(99.0) == 0.0


def test_interval_starts_with_the_start_of_a_sync(schedule: Schedule) -> None:
    schedule.request()
    schedule.started(10.0)
    schedule.request()
    schedule.succeeded()
    assert schedule.wait(13.0) == 0.0


def test_change_during_a_sync_is_not_lost(schedule: Schedule) -> None:
    schedule.request()
    schedule.started(0.0)
    schedule.request()
    schedule.succeeded()
    assert schedule.wait(5.0) == 0.0


def fail(schedule: Schedule, now: float) -> float:
    schedule.started(now)
    schedule.failed(now)
    wait = schedule.wait(now)
    assert wait is not None
    return wait


def test_failed_sync_is_retried_with_exponential_backoff() -> None:
    schedule = Schedule(min_interval=0.0, max_retry=8.0)
    schedule.request()
    waits = [fail(schedule, 100.0 * n) for n in range(7)]
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_retry_respects_the_minimum_interval(schedule: Schedule) -> None:
    schedule.request()
    assert fail(schedule, 0.0) == 1.0 > FIRST_RETRY_SECONDS


def test_change_after_a_failure_brings_the_retry_forward(schedule: Schedule) -> None:
    schedule.request()
    assert [fail(schedule, 100.0 * n) for n in range(4)][-1] == 4.0
    schedule.request()
    assert schedule.wait(300.0) == 1.0


def test_success_resets_the_backoff(schedule: Schedule) -> None:
    schedule.request()
    assert [fail(schedule, 100.0 * n) for n in range(4)][-1] == 4.0
    schedule.started(400.0)
    schedule.succeeded()
    assert schedule.wait(500.0) is None
    schedule.request()
    assert [fail(schedule, 500.0 + 100 * n) for n in range(3)] == [1.0, 1.0, 2.0]


def test_backoff_starts_with_the_end_of_the_failed_sync(schedule: Schedule) -> None:
    schedule.request()
    schedule.started(0.0)
    schedule.failed(60.0)
    assert schedule.wait(60.0) == FIRST_RETRY_SECONDS


def test_retries_never_stop(schedule: Schedule) -> None:
    schedule.request()
    assert {fail(schedule, 100.0 * n) for n in range(5000)} >= {8.0}
    assert fail(schedule, 1e6) == 8.0


@given(
    st.lists(st.tuples(st.sampled_from(("request", "succeed", "fail")), st.floats(0.0, 5.0)), max_size=40),
)
def test_syncs_respect_the_interval_and_pending_changes_are_always_scheduled(
    history: list[tuple[str, float]],
) -> None:
    schedule, now, last, pending = Schedule(min_interval=1.0, max_retry=8.0), 0.0, -10.0, False
    for event, pause in history:
        now += pause
        if event == "request":
            schedule.request()
            pending = True
        elif (wait := schedule.wait(now)) is not None:
            assert wait <= 8.0
            now += wait
            assert now - last >= 1.0 - 1e-9
            last = now
            schedule.started(now)
            if event == "fail":
                schedule.failed(now)
            else:
                schedule.succeeded()
                pending = False
        assert (schedule.wait(now) is not None) is pending
