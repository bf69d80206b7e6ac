"""`python -m kproxy`, and the console script."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:2] == ["run"]:
        # They wait until the daemon asks for them: as PID 1, it would never get one that comes before.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        from kproxy.cli.main import main as run_command_line  # noqa: PLC0415 - so that Ctrl-C in here is no traceback

        return run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
