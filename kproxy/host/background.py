"""Start threads while kproxy runs, without ever waiting for a thread that did not start."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

START_SECONDS = 5.0
"""How long to wait for a new thread to begin. After that, it will not begin any more."""


class ThreadStartError(Exception):
    """A thread could not be started, and the function was not called. The message is one line."""


class BackgroundCall:
    """A function call in a new daemon thread, which inherits the caller's network namespace.

    Unlike the threads of an executor, it does not delay the exit of the process.

    `threading.Thread.start` waits until the new thread reports that it runs. A thread that runs out of memory before
    that reports nothing, and `start` never returns. `BackgroundCall` waits for a limited time. It uses locks instead of
    events, because these need no memory.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        """Start the call. Raises `ThreadStartError`."""
        self._call = call
        self._error: BaseException | None = None
        self._claim = threading.Lock()
        """Held by the thread that makes the call, or by the caller if it no longer waits for the thread."""
        self._begun = threading.Lock()
        """Held until the call begins."""
        self._running = threading.Lock()
        """Held until the call has ended."""
        self._begun.acquire()
        self._running.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError) as error:
            raise ThreadStartError(str(error) or "out of memory") from None
        if not self._begun.acquire(timeout=START_SECONDS) and self._claim.acquire(blocking=False):
            raise ThreadStartError(f"the new thread did not begin within {START_SECONDS:.0f} s")

    def join(self) -> None:
        """Wait until the call has returned or raised an error."""
        with self._running:
            pass

    def result(self) -> None:
        """Wait until the call has returned. If it raised an error, raise that error again."""
        self.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._begun.release()
            self._call()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._error = error
        finally:
            self._running.release()
