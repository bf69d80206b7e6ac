"""How commands print."""

from __future__ import annotations

import sys

from kproxy.cli.errors import FailureError


def show(text: str) -> None:
    """Print to standard output, at once. Raises `FailureError`, or `BrokenPipeError` if nobody reads on."""
    if sys.stdout is None:
        raise FailureError("cannot print: standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        sys.stdout = None  # or the interpreter would try once more at its end
        raise FailureError(f"cannot print: {error.strerror}") from None
