"""Pipelined processing: one item is processed while the next one is produced, and none after a failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kproxy.nftables.backend import run_pipelined
from tests.lab.waiting import HANG_GUARD


def test_no_thread_for_fewer_than_two_items() -> None:
    threads: list[int] = []
    run_pipelined(lambda _: threads.append(threading.get_ident()), [])
    run_pipelined(lambda _: threads.append(threading.get_ident()), ["item"])
    assert threads == [threading.get_ident()]


def test_items_are_processed_in_order_while_the_next_ones_are_produced() -> None:
    """Processing item 2 waits until item 3 is requested, so both must run at the same time."""
    processed: list[int] = []
    fourth = threading.Event()

    def items() -> Iterator[int]:
        for number in range(6):
            if number == 3:
                fourth.set()
            yield number

    def process(number: int) -> None:
        if number == 2:
            assert fourth.wait(HANG_GUARD)
        processed.append(number)

    run_pipelined(process, items())
    assert processed == list(range(6))


@pytest.mark.parametrize("failing", [0, 1, 3, 5])
def test_no_item_is_processed_after_a_failure(failing: int) -> None:
    started: list[int] = []

    def process(number: int) -> None:
        started.append(number)
        if number == failing:
            raise ValueError(f"no {number}")

    with pytest.raises(ValueError, match=f"no {failing}"):
        run_pipelined(process, range(6))
    assert started == list(range(failing + 1))


@pytest.mark.parametrize("failing", [0, 1, 2, 5])
def test_running_call_has_finished_when_producing_an_item_fails(failing: int) -> None:
    started: list[int] = []
    finished: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            if number == failing:
                raise ValueError(f"no {number}")
            yield number

    def process(number: int) -> None:
        started.append(number)
        finished.append(number)

    with pytest.raises(ValueError, match=f"no {failing}"):
        run_pipelined(process, items())
    assert started == finished
    assert started == list(range(failing))[: len(started)]


def test_one_item_is_processed_at_a_time() -> None:
    running = 0
    maximum = 0

    def process(_: int) -> None:
        nonlocal running, maximum
        running += 1
        maximum = max(maximum, running)
        running -= 1

    run_pipelined(process, range(50))
    assert maximum == 1
