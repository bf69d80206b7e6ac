"""One thing is done while the next is made, and nothing after a failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kproxy.nftables.backend import pipelined

HANG = 30.0


def test_nothing_and_one_thing_take_no_thread() -> None:
    threads: list[int] = []
    pipelined(lambda _: threads.append(threading.get_ident()), [])
    pipelined(lambda _: threads.append(threading.get_ident()), ["one"])
    assert threads == [threading.get_ident()]


def test_things_are_done_in_their_order_while_the_next_is_made() -> None:
    """The second is done only when the fourth is under way: each waits for the other."""
    done: list[int] = []
    fourth = threading.Event()

    def things() -> Iterator[int]:
        for number in range(6):
            if number == 3:
                fourth.set()
            yield number

    def do(number: int) -> None:
        if number == 2:
            assert fourth.wait(HANG)
        done.append(number)

    pipelined(do, things())
    assert done == list(range(6))


@pytest.mark.parametrize("bad", [0, 1, 3, 5])
def test_nothing_is_begun_after_a_failure(bad: int) -> None:
    begun: list[int] = []

    def do(number: int) -> None:
        begun.append(number)
        if number == bad:
            raise ValueError(f"no {number}")

    with pytest.raises(ValueError, match=f"no {bad}"):
        pipelined(do, range(6))
    assert begun == list(range(bad + 1))


@pytest.mark.parametrize("bad", [0, 1, 2, 5])
def test_what_was_begun_has_ended_when_the_next_cannot_be_made(bad: int) -> None:
    begun: list[int] = []
    ended: list[int] = []

    def things() -> Iterator[int]:
        for number in range(6):
            if number == bad:
                raise ValueError(f"no {number}")
            yield number

    def do(number: int) -> None:
        begun.append(number)
        ended.append(number)

    with pytest.raises(ValueError, match=f"no {bad}"):
        pipelined(do, things())
    assert begun == ended
    assert begun == list(range(bad))[: len(begun)]


def test_one_at_a_time() -> None:
    under_way = 0
    most = 0

    def do(_: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        under_way -= 1

    pipelined(do, range(50))
    assert most == 1
