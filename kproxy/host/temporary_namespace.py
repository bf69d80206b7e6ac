"""Run a function in a network namespace that exists only during the call."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TypeVar

from kproxy.host.background import BackgroundCall

CLONE_NEWNET = 0x40000000  # linux/sched.h
_T = TypeVar("_T")


class NoNamespaceError(Exception):
    """A process may not create a network namespace, which needs CAP_SYS_ADMIN. The message is one line."""


def call_in_new_namespace(function: Callable[[], _T]) -> _T:
    """Call a function in a thread with an empty network namespace of its own, and return its result.

    Programs that the function runs are in that namespace, too. When the last of them has exited, the kernel removes the
    namespace with all of its rules. Raises `NoNamespaceError`, and what the function raises.
    """
    results: list[_T] = []

    def run() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            raise NoNamespaceError(f"cannot create a network namespace: {os.strerror(ctypes.get_errno())}")
        results.append(function())

    BackgroundCall(run).result()
    return results[0]
