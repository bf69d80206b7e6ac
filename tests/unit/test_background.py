"""Calls in new threads: they return or fail, but the caller never waits for a thread that did not begin."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable

import pytest

from kproxy.host import background
from kproxy.host.background import BackgroundCall, ThreadStartError
from kproxy.host.commands import CommandRunner, InconclusiveError
from kproxy.nftables.backend import run_pipelined
from tests.lab.waiting import HANG_GUARD, wait_until

Start = Callable[[Callable[[], object], tuple[()]], int]


def refuse(*_: object) -> int:
    raise RuntimeError("can't start new thread")


def run_out_of_memory(*_: object) -> int:
    raise MemoryError


def end_at_once(*_: object) -> int:
    """Behave as if the new thread ended before it could make its call."""
    return 0


@pytest.fixture(params=[refuse, run_out_of_memory, end_at_once])
def _no_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    start: Start = request.param
    monkeypatch.setattr(background, "START_SECONDS", 0.01)
    monkeypatch.setattr(_thread, "start_new_thread", lambda call, args, _start=start: _start(call, args))


def test_call_runs_in_another_thread() -> None:
    threads: list[int] = []
    BackgroundCall(lambda: threads.append(threading.get_ident())).result()
    assert threads
    assert threads != [threading.get_ident()]


def test_error_is_raised_in_the_callers_thread() -> None:
    def fail() -> None:
        raise ValueError("no")

    call = BackgroundCall(fail)
    call.join()
    with pytest.raises(ValueError, match=r"^no$"):
        call.result()


def test_thread_that_begins_too_late_does_not_make_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[Callable[[], object]] = []
    monkeypatch.setattr(background, "START_SECONDS", 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(_thread, "start_new_thread", lambda call, _: late.append(call))
        calls: list[None] = []
        with pytest.raises(ThreadStartError, match=r"^the new thread did not begin within 0 s$"):
            BackgroundCall(lambda: calls.append(None))
    late[0]()
    assert calls == []


@pytest.mark.usefixtures("_no_threads")
def test_items_are_processed_without_threads_if_none_can_be_started() -> None:
    processed: list[tuple[int, int]] = []
    run_pipelined(lambda item: processed.append((item, threading.get_ident())), range(4))
    assert processed == [(item, threading.get_ident()) for item in range(4)]


@pytest.mark.usefixtures("_no_threads")
def test_error_without_threads_ends_the_processing() -> None:
    processed: list[int] = []

    def process(item: int) -> None:
        processed.append(item)
        if item == 1:
            raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        run_pipelined(process, range(4))
    assert processed == [0, 1]


@pytest.mark.usefixtures("_no_threads")
def test_program_is_not_run_without_a_watchdog() -> None:
    runner = CommandRunner()
    with pytest.raises(InconclusiveError, match=r"^cannot start a watchdog for cat: "):
        runner.stream_input(["cat"], ["x"], timeout=HANG_GUARD)
    assert runner._running is None


def test_threads_end_with_their_calls() -> None:
    before = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        BackgroundCall(lambda: None).result()
    wait_until(lambda: len(os.listdir("/proc/self/task")) <= before, "the threads have ended")
