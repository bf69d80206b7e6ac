"""Print to standard output, and define the errors that make a command fail."""

from __future__ import annotations

import sys


class UsageError(Exception):
    """Invalid flags or configuration. The message has one line for each problem. The exit code is 2."""


class CommandFailedError(Exception):
    """The command failed. The message has one line for each problem. The exit code is 1."""


class CannotTellError(Exception):
    """The command cannot find out what it was asked, for example because no daemon runs. The exit code is 3.

    The message has one line for each problem.
    """


def show(text: str) -> None:
    """Print to standard output and flush.

    Raises `CommandFailedError` if writing fails, and `BrokenPipeError` if the reader has closed the pipe.
    """
    if sys.stdout is None:
        raise CommandFailedError("cannot write to standard output: it is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # otherwise, the interpreter would flush it again at exit
        raise CommandFailedError(f"cannot write to standard output: {error.strerror}") from None
