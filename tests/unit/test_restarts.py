"""Pauses and log messages when a thread starts its work again after unexpected errors."""

from __future__ import annotations

from kproxy.model.restarts import FIRST_DELAY, LONGEST_DELAY, Restarts


def test_pauses_grow_and_messages_become_rare() -> None:
    restarts = Restarts("address-monitor")
    now, delays, messages = 0.0, [], []
    while now < 7200:
        delay, text = restarts.failed(MemoryError("no memory"), now)
        delays.append(delay)
        now += delay
        if text:
            messages.append(text)
    assert delays[:4] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY, 8 * FIRST_DELAY]
    assert max(delays) == LONGEST_DELAY
    assert set(messages) == {"address-monitor: unexpected MemoryError('no memory'); trying again"}
    assert 5 <= len(messages) <= 8


def test_another_error_is_logged_at_once() -> None:
    restarts = Restarts("http")
    assert restarts.failed(ValueError("one"), 0.0)[1]
    assert not restarts.failed(ValueError("one"), 1.0)[1]
    assert restarts.failed(ValueError("two"), 2.0)[1] == "http: unexpected ValueError('two'); trying again"


def test_pauses_start_over_after_a_time_without_errors() -> None:
    restarts = Restarts("http")
    for second in range(5):
        restarts.failed(ValueError("one"), second)
    assert restarts.failed(ValueError("one"), 1000.0)[0] == FIRST_DELAY


def test_error_that_cannot_be_described_has_the_longest_pause() -> None:
    class Indescribable(Exception):  # noqa: N818 - stands for any error
        def __repr__(self) -> str:
            raise MemoryError

    assert Restarts("http").failed(Indescribable(), 0.0) == (LONGEST_DELAY, "")
