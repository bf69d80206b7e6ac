"""Entry point of `python -m kproxy` and of the `kproxy` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.argv[1:2] == ["run"]:
        # Block signals before anything else. Otherwise, as PID 1, the daemon would lose a signal that arrives before it
        # waits for signals.
        from kproxy.host.signals import block_signals  # noqa: PLC0415 - only the daemon needs it

        block_signals()
    try:
        from kproxy.cli.main import main as run_command_line  # noqa: PLC0415 - inside `try`, so that Ctrl-C during the import prints no traceback

        return run_command_line(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
