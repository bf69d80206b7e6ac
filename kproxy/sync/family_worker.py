"""The threads that program the kernel: one for each family, so that a slow program of one never delays the other."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from kproxy.model.restarts import Restarts

Job: TypeAlias = Callable[[], None]
"""Work for one family. It must handle its own exceptions. An unexpected one is logged, and the next job follows."""
OUT_OF_MEMORY_SECONDS = 0.5
"""Pause before the next job if there was not enough memory to handle an error."""
log = logging.getLogger(__name__)


class FamilyWorker:
    """A thread that runs the jobs of one family, one after another."""

    def __init__(self, name: str) -> None:
        """Create the worker, but do not start its thread yet. `name` is the name of the thread."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._restarts = Restarts(name)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run a job after all earlier ones."""
        self._jobs.put(job)

    def stop(self, timeout: float) -> None:
        """Stop after the jobs that have been submitted. Wait at most `timeout` seconds for them."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            try:
                self._run_jobs()
            except MemoryError:  # not even enough memory to handle an error
                time.sleep(OUT_OF_MEMORY_SECONDS)
            else:
                return

    def _run_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # no error may stop the updates of a family
                delay, text = self._restarts.failed(error, time.monotonic())
                with suppress(MemoryError):
                    log.log(logging.ERROR if text else logging.DEBUG, "%s", text or error)
                    log.debug("job failed", exc_info=error)
                time.sleep(delay)
