"""When a problem that lasts is logged again."""

from __future__ import annotations

from kproxy.model.logging import LogThrottle

HOUR = 3600.0


def moments(reminder: LogThrottle, until: float, since: float = 0.0) -> list[float]:
    """Return when it was due, asked exactly when it says so, and every 10 s besides."""
    now, found = since, []
    while now <= until:
        if reminder.is_due(now):
            found.append(now - since)
        now += min(10.0, reminder.wait(now))
    return found


def test_pauses_grow_up_to_an_hour() -> None:
    minutes = [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    assert moments(LogThrottle(), 4.5 * HOUR) == [60.0 * minute for minute in minutes]


def test_another_problem_starts_over() -> None:
    reminder = LogThrottle()
    moments(reminder, HOUR)
    reminder.reset()
    assert reminder.wait(2 * HOUR) == 0.0
    assert moments(reminder, 2 * HOUR + 200.0, since=2 * HOUR) == [0.0, 60.0, 180.0]


def test_who_asks_late_gets_one_line_and_the_next_pause_begins_then() -> None:
    reminder = LogThrottle()
    assert reminder.is_due(0.0)
    assert reminder.is_due(1000.0)
    assert not reminder.is_due(1119.0)
    assert reminder.wait(1119.0) == 1.0
