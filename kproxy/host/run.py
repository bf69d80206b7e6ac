"""Running programs: the only place that starts one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from signal import SIGPIPE
from tempfile import TemporaryFile

from msgspec import Struct


class CommandError(Exception):
    """A program could not be run, or ended with an error; the message says which and why, on one line."""


class Completed(Struct, frozen=True):
    """How a program ended: `code` is its exit status, -1 if it was ended for taking too long."""

    code: int
    stdout: str
    stderr: str


def run(argv: Sequence[str], stdin: str = "", *, timeout: float) -> Completed:
    """Run a program to its end and return what it said.

    Bytes that are no UTF-8 come and go as surrogate escapes (PEP 383). `timeout` is in seconds and guards against
    hanging: the program is then killed. Raises `CommandError` if it cannot be started.
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Completed(-1, "", f"{argv[0]} did not end within {timeout:.0f} s")
    except OSError as error:
        raise CommandError(f"cannot run {argv[0]}: {error.strerror or error}") from None
    return Completed(done.returncode, done.stdout, done.stderr)


@contextmanager
def reading(argv: Sequence[str]) -> Iterator[Iterator[str]]:
    """Run a program and read its output line by line, never holding all of it.

    Bytes that are no UTF-8 become surrogate escapes (PEP 383). Who leaves early ends the program. Raises
    `CommandError` if it cannot be started or ends with an error.
    """
    with TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8", errors="surrogateescape"
            )
        except OSError as error:
            raise CommandError(f"cannot run {argv[0]}: {error.strerror or error}") from None
        with process:
            assert process.stdout is not None
            yield process.stdout
            # Closing the pipe ends a program that still writes, by SIGPIPE.
        if process.returncode not in {0, -SIGPIPE}:
            complaints.seek(0)
            complaint = first_line(complaints.read().decode("utf-8", "backslashreplace"))
            raise CommandError(f"{argv[0]} failed with status {process.returncode}: {complaint}")


def first_line(text: str) -> str:
    """Return the first line that says anything, for messages of one line; iptables' remarks begin with #."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "no message")
