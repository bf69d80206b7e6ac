"""The signals that the daemon handles. This module is imported before all others, so it imports almost nothing."""

from __future__ import annotations

import signal

STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
"""The signals that shut the daemon down. The rules stay in the kernel."""
STACK_DUMP_SIGNALS = frozenset({signal.SIGUSR1, signal.SIGQUIT})
"""The signals on which the daemon dumps the stacks of all threads to stderr. It continues to run."""
IGNORED_SIGNALS = frozenset({signal.SIGHUP, signal.SIGUSR2})
"""The signals that the daemon only logs. Their default action would terminate the process without a log message."""
_DISCARDED_SIGNALS = (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR)
"""Other signals whose default action would terminate the process. They are not blocked, because child processes would
inherit this: iptables waits for its lock with SIGALRM."""
HANDLED_SIGNALS = STOP_SIGNALS | STACK_DUMP_SIGNALS | IGNORED_SIGNALS


def block_signals() -> None:
    """Block the handled signals, so that they stay pending until `sigwait`. Discard others that would end the process.

    New threads and child processes inherit the blocked signals. Blocking also works for PID 1 of a container: the
    kernel normally discards signals to PID 1 that have no handler, but it queues blocked signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    for number in _DISCARDED_SIGNALS:
        signal.signal(number, _discard)


def _discard(*_: object) -> None:
    pass
