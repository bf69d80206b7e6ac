"""The `kproxy` command: run a subcommand, print its errors and return an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kproxy.cli.console import CannotTellError, CommandFailedError, UsageError
from kproxy.cli.parser import parse


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 0 for success, 1 for a failure, 2 for invalid usage.

    Commands that print reports return their own exit code (`kproxy.cli.output.ExitCode`).

    Prints errors to stderr, one per line. The argument parser raises `SystemExit`: with code 0 after `--help` and
    `--version`, and with code 2 if the arguments cannot be parsed or no command is given.
    """
    try:
        options = parse(arguments)
        code: int | None = options.command(options)
    except UsageError as error:
        return _report(error, 2)
    except CommandFailedError as error:
        return _report(error, 1)
    except CannotTellError as error:
        return _report(error, 3)
    except BrokenPipeError:
        # The program that reads the output, such as `head`, has exited. Redirect stdout: otherwise, the interpreter
        # would fail when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        import logging

        logging.getLogger(__name__).debug("traceback", exc_info=error)
        return _report(f"unexpected error: {error!r}; this is a bug, please report it with the output of -v=4", 1)
    return code or 0


def _report(error: object, code: int) -> int:
    import logging

    from kproxy.cli.log_format import writes_json
    from kproxy.model.printable_text import MAX_LENGTH, printable

    for line in str(error).split("\n"):  # not splitlines(): a quoted value can contain U+2028
        if writes_json():
            logging.getLogger(__name__).error("%s", line)  # a log parser expects every line to be JSON
        else:
            print(f"kproxy: {printable(line, MAX_LENGTH)}", file=sys.stderr)
    return code
