"""Run fuzz targets and report the first input that breaks one."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tests.fuzz.mutation import mutate
from tests.fuzz.targets import Target

MAX_SECONDS = 10
"""Seconds after which an input counts as making a parser hang. The slowest valid input takes milliseconds."""


class BrokenParserError(AssertionError):
    """An input breaks a target. The message contains the input and the command that runs it again."""


def run_corpus(target: Target) -> None:
    """Run every input of the corpus of a target. Raises `BrokenParserError`."""
    for data in target.corpus():
        run_input(target, data)


def run_mutations(target: Target, seed: int, count: int) -> None:
    """Run `count` mutated inputs, which depend only on the corpus and `seed`. Raises `BrokenParserError`."""
    source, corpus = random.Random(f"{target.name} {seed}"), target.corpus()
    for _ in range(count):
        run_input(target, mutate(source, corpus))


def run_input(target: Target, data: bytes) -> None:
    """Run one input. Raises `BrokenParserError`, also if the target hangs."""
    try:
        with _time_limit():
            target.check(data)
    except Exception as error:
        text = f"{target.name}: {type(error).__name__}: {error}\ninput: {data!r}\n"
        raise BrokenParserError(
            f"{text}run it again: python -m tests.fuzz --target={target.name} --hex={data.hex()}"
        ) from error


@contextmanager
def _time_limit() -> Iterator[None]:
    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no result after {MAX_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
