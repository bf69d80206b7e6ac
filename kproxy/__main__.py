"""`python -m kproxy`, and the console script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    from kproxy.cli.main import main as run_command_line  # noqa: PLC0415 - errors in an import have a place to go

    return run_command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
