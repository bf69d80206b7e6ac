"""Entry point of `python -m kproxy` and of the `kproxy` command."""

from __future__ import annotations

import gc
import sys

GC_THRESHOLD = 10_000
"""Number of new containers after which Python searches the newest ones for unused cycles, instead of after 700.

The modules that the daemon imports consist of tens of thousands of containers. Searching them again and again takes a
tenth of the time of a start, and finds nothing.
"""


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:2] == ["run"]:
        # Block signals before anything else. Otherwise, as PID 1, the daemon would lose a signal that arrives before it
        # waits for signals.
        from kproxy.host.signals import block_signals  # noqa: PLC0415 - only the daemon needs it

        block_signals()
        gc.set_threshold(GC_THRESHOLD)
    try:
        from kproxy.cli.main import main as run_command_line  # noqa: PLC0415 - inside `try`, so that Ctrl-C during the import prints no traceback

        return run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
