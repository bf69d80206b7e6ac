"""`python -m kproxy`, and the console script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:2] == ["run"]:
        # They wait until the daemon asks for them: as PID 1, it would never get one that comes before.
        from kproxy.host.signals import block_signals  # noqa: PLC0415 - only the daemon waits for them

        block_signals()
    try:
        from kproxy.cli.main import main as run_command_line  # noqa: PLC0415 - so that Ctrl-C in here is no traceback

        return run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
