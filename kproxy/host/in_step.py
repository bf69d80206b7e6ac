"""Doing one thing while the next is being prepared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_T = TypeVar("_T")


def in_step(do: Callable[[_T], object], things: Iterable[_T]) -> None:
    """Call `do` with each thing, in their order, one at a time, while the next thing is being made.

    A single thing is done in the calling thread; of several, each is done in a thread that belongs to the same network
    namespace. Raises what `do` or making a thing raised: nothing more is begun then, and what was begun has ended.
    """
    iterator = iter(things)
    ready = list(islice(iterator, 2))
    if len(ready) == 1:
        do(ready[0])
    if len(ready) < 2:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="in-step") as worker:
        running = worker.submit(do, ready.pop(0))
        while ready:
            running.result()
            running = worker.submit(do, ready.pop())
            ready += islice(iterator, 1)
        running.result()
