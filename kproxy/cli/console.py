"""Printing to standard output, and the errors that end a command."""

from __future__ import annotations

import sys


class UsageError(Exception):
    """The command was called wrongly: flags or configuration. Exit code 2."""


class CommandFailedError(Exception):
    """The command could not do what it was asked for. Exit code 1."""


def show(text: str) -> None:
    """Print to standard output, at once. Raises `CommandFailedError`, or `BrokenPipeError` if nobody reads on."""
    if sys.stdout is None:
        raise CommandFailedError("cannot print: standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # or the interpreter would try once more at its end
        raise CommandFailedError(f"cannot print: {error.strerror}") from None
