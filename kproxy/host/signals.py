"""The signals that the daemon takes. Imported before anything else, so it imports next to nothing itself."""

from __future__ import annotations

import signal

STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})
"""End the daemon; the rules stay."""
STACKS = frozenset({signal.SIGUSR1, signal.SIGQUIT})
"""Write the stacks of all threads to stderr, as they do in other daemons; the daemon goes on."""
IGNORED = frozenset({signal.SIGHUP, signal.SIGUSR2})
"""Only logged. Left to their default they would end the process without a word."""
HANDLED = STOPPING | STACKS | IGNORED


def block_signals() -> None:
    """Have these signals wait for `sigwait`; threads and programs that the calling thread starts inherit that.

    Even the first process of a container gets signals that are blocked, though it has no handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
