"""How often a persistent problem is logged."""

from __future__ import annotations

from kproxy.model.log_throttle import LogThrottle

HOUR = 3600.0


def due_times(throttle: LogThrottle, until: float, since: float = 0.0) -> list[float]:
    """Return the times at which the throttle is due, checked at each of them and at least every 10 s."""
    now, times = since, []
    while now <= until:
        if throttle.is_due(now):
            times.append(now - since)
        now += min(10.0, throttle.wait(now))
    return times


def test_intervals_double_up_to_an_hour() -> None:
    minutes = [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert due_times(LogThrottle(), 4.5 * HOUR) == [60.0 * minute for minute in minutes]


def test_reset_starts_over() -> None:
    throttle = LogThrottle()
    due_times(throttle, HOUR)
    throttle.reset()
    assert throttle.wait(2 * HOUR) == 0.0
    assert due_times(throttle, 2 * HOUR + 200.0, since=2 * HOUR) == [0.0, 60.0, 180.0]


def test_late_check_is_due_once_and_starts_the_next_interval() -> None:
    throttle = LogThrottle()
    assert throttle.is_due(0.0)
    assert throttle.is_due(1000.0)
    assert not throttle.is_due(1119.0)
    assert throttle.wait(1119.0) == 1.0
