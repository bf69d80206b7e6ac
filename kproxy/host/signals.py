"""The signals that the daemon handles. Imported before all other modules, so it imports almost nothing."""

from __future__ import annotations

import signal

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
"""Shut the daemon down; the rules stay in the kernel."""
STACK_DUMP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGQUIT})
"""Dump the stacks of all threads to stderr and continue running."""
IGNORED_SIGNALS = frozenset({signal.SIGHUP, signal.SIGUSR2})
"""Only logged. Their default action would terminate the process silently."""
HANDLED_SIGNALS = STOP_SIGNALS | STACK_DUMP_SIGNALS | IGNORED_SIGNALS


def block_signals() -> None:
    """Block the handled signals, so that they stay pending until `sigwait`. Threads and child processes inherit this.

    Blocking is enough for PID 1 of a container, too: the kernel queues blocked signals even without a handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
