"""Running programs: the only place that starts one."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from signal import SIGPIPE
from typing import Any

from msgspec import Struct


class CommandError(Exception):
    """A program could not be run, or ended with an error; the message says which and why, on one line."""


class Completed(Struct, frozen=True):
    """How a program ended: `code` is its exit status, -1 if it was ended for taking too long."""

    code: int
    stdout: str
    stderr: str


class Programs:
    """Runs programs one at a time; another thread may stop that for good.

    What programs read and write is UTF-8; other bytes come and go as surrogate escapes (PEP 383).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._stopped = False

    def stop(self) -> None:
        """Kill the program that runs now, wait for its end, and refuse to start others."""
        with self._lock:
            self._stopped = True
            running = self._running
        if running is not None:
            running.kill()
            running.wait()

    def run(self, argv: Sequence[str], stdin: str = "", *, timeout: float) -> Completed:
        """Run a program to its end and return what it said.

        `timeout` is in seconds and guards against hanging: the program is then killed. Raises `CommandError` if it
        cannot be started.
        """
        pipe = subprocess.PIPE
        with self._start(argv, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            try:
                said, complaints = process.communicate(stdin, timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                return Completed(-1, "", f"{argv[0]} did not end within {timeout:.0f} s")
        return Completed(process.returncode, said, complaints)

    @contextmanager
    def reading(self, argv: Sequence[str], *, timeout: float) -> Iterator[Iterator[str]]:
        """Run a program and read its output line by line, never holding all of it.

        Who leaves early ends the program. Raises `CommandError` if it cannot be started or ends with an error, which
        it also does when `timeout`, in seconds, is over.
        """
        # A file without a file system: the root may be read-only, and a pipe could fill up unread.
        with open(os.memfd_create("stderr"), "w+b") as complaints:
            with self._start(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints) as process:
                guard = threading.Timer(timeout, process.kill)
                guard.daemon = True
                guard.start()
                try:
                    assert process.stdout is not None
                    yield process.stdout
                    process.stdout.close()  # ends a program that still writes, by SIGPIPE
                    process.wait()
                finally:
                    guard.cancel()
                    process.kill()
            if process.returncode not in {0, -SIGPIPE}:
                complaints.seek(0)
                complaint = first_line(complaints.read().decode("utf-8", "backslashreplace"))
                raise CommandError(f"{argv[0]} failed with status {process.returncode}: {complaint}")

    @contextmanager
    def _start(self, argv: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self._stopped:
                raise CommandError(f"{argv[0]} is not started any more: kproxy is stopping")
            try:
                process = subprocess.Popen(argv, encoding="utf-8", errors="surrogateescape", **streams)
            except OSError as error:
                raise CommandError(f"cannot run {argv[0]}: {error.strerror or error}") from None
            self._running = process
        try:
            with process:
                yield process
        finally:
            self._running = None


def run(argv: Sequence[str], stdin: str = "", *, timeout: float) -> Completed:
    """Run one program that nobody will want to stop; see `Programs.run`."""
    return Programs().run(argv, stdin, timeout=timeout)


def first_line(text: str) -> str:
    """Return the first line that says anything, for messages of one line; iptables' remarks begin with #."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "no message")
