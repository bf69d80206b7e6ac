"""`python -m kproxy`, and the console script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    try:
        from kproxy.cli.main import main as run_command_line  # noqa: PLC0415 - so that Ctrl-C in here is no traceback

        return run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
