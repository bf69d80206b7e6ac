"""Count how often a module of kproxy tries to listen on a port."""

from __future__ import annotations

import socket
import threading

import pytest

from kproxy.serve.server import ListenAddress, listen
from tests.lab.waiting import HANG_GUARD

MANY = 20


class ListenAttempts:
    """Makes a module retry at once, and counts its attempts to listen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self._made = threading.Semaphore(0)
        monkeypatch.setattr(f"{module}.RETRY_SECONDS", 0.001)
        monkeypatch.setattr(f"{module}.listen", self._attempt)

    def _attempt(self, address: ListenAddress) -> socket.socket:
        self._made.release()
        return listen(address)

    def wait_for_many(self) -> bool:
        """Wait for many further attempts; return False if they do not happen within `HANG_GUARD`."""
        while self._made.acquire(blocking=False):
            pass  # an earlier attempt
        return all(self._made.acquire(timeout=HANG_GUARD) for _ in range(MANY))
