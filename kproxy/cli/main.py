"""The `kproxy` command: which subcommand, and what its errors look like."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kproxy.cli.console import CommandFailedError, UsageError
from kproxy.cli.parser import parse


def main(arguments: Sequence[str]) -> int:
    """Run one command. Return 0, 1 if it failed, or 2 if it was called wrongly; errors are one line on stderr.

    Raises `SystemExit` with 0 after `--help` and `--version`, and with 2 for wrong flags.
    """
    try:
        options = parse(arguments)
        options.command(options)
    except UsageError as error:
        return _complain(error, 2)
    except CommandFailedError as error:
        return _complain(error, 1)
    except BrokenPipeError:
        # Whoever read our output has seen enough; leave nothing that the interpreter would flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        import logging

        logging.getLogger(__name__).debug("where it happened", exc_info=error)
        return _complain(f"unexpected {error!r}: please report this (with -v=4 it says where)", 1)
    return 0


def _complain(error: object, code: int) -> int:
    import logging

    from kproxy.cli.logs import printable, writes_json

    for line in str(error).splitlines():
        if writes_json():
            logging.getLogger(__name__).error("%s", line)  # what reads JSON reads nothing else
        else:
            print(f"kproxy: {printable(line)}", file=sys.stderr)
    return code
