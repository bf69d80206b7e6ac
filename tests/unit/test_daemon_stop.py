"""The daemon stops its parts in reverse order and exits normally within about a second, even if a part hangs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.lab.waiting import HANG_GUARD

DAEMON = """
import atexit, logging, os, signal, sys, threading
from kproxy.app import daemon
from kproxy.app.daemon import Daemon
from kproxy.app.backends import StartError
from kproxy.config import Config
from kproxy.documents.watch import PathWatcher
from kproxy.nftables.backend import run_pipelined
from kproxy.sync.reconciler import Stop

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
atexit.register(print, "at exit")
daemon.LIVENESS_SECONDS = 0.1


def refuse(*_):
    raise RuntimeError("can't start new thread")


def hang(*_):
    threading.Event().wait()


class Part:
    def __init__(self, name, hangs=False):
        self.name, self.hangs = name, hangs

    def start(self):
        print("start", self.name)

    def stop(self, timeout):
        print("stop", self.name)
        if self.hangs:
            hang()


class Reconciler:
    def __init__(self, in_progress=lambda: None):
        self.in_progress = in_progress

    def run(self, messages):
        if sys.argv[1] == "vanished":
            return
        os.kill(os.getpid(), signal.SIGTERM)
        self.in_progress()
        assert isinstance(messages.get(), Stop)
        if sys.argv[1] == "late failure":
            raise ValueError("broken")
        print("reconciler stopped")


class StoppedDaemon(Daemon):
    def _build(self, parts):
        case = sys.argv[1]
        self._start(parts, Part("server"))
        self._start(parts, Part("source", hangs=case == "part"))
        if case == "build":
            os.kill(os.getpid(), signal.SIGTERM)
            hang()
        if case == "no thread":
            threading.Thread.start = refuse
            self._start(parts, PathWatcher(os.devnull, lambda _: True, name="watcher", poll_period=1.0))
        if case == "failure":
            raise ValueError("broken")
        if case == "sync":
            return Reconciler(hang)
        if case == "commit":
            return Reconciler(lambda: run_pipelined(hang, [1, 2, 3]))
        return Reconciler()


try:
    StoppedDaemon(Config(), None, None, None, own_log=None).run()
except (RuntimeError, StartError) as error:
    print(error)
    sys.exit(1)
"""
STOPPING = "SIGTERM: stopping; existing rules stay active"
STARTED = ["start server", "start source"]


@pytest.mark.parametrize(
    ("case", "code", "lines"),
    [
        ("nothing", 0, [STOPPING, "reconciler stopped", "stop source", "stop server"]),
        ("part", 0, [STOPPING, "reconciler stopped", "stop source"]),
        ("sync", 0, [STOPPING]),
        ("commit", 0, [STOPPING]),
        ("build", 0, [STOPPING]),
        (
            "late failure",
            1,
            [STOPPING, "stop source", "stop server", "thread reconciler failed: ValueError('broken')"],
        ),
        ("failure", 1, ["stop source", "stop server", "thread reconciler failed: ValueError('broken')"]),
        ("no thread", 1, ["stop source", "stop server", "cannot start a thread: can't start new thread"]),
        ("vanished", 1, ["stop source", "stop server", "thread reconciler has ended unexpectedly"]),
    ],
)
def test_process_exits_within_about_a_second_even_if_a_part_hangs(case: str, code: int, lines: list[str]) -> None:
    command = [sys.executable, "-u", "-c", DAEMON, case]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD, check=False)
    seconds = time.monotonic() - started
    assert (done.returncode, done.stderr) == (code, "")
    # The main thread logs while the reconciler's thread stops the parts.
    assert sorted(done.stdout.splitlines()[2:]) == sorted([*lines, "at exit"])
    assert [line for line in done.stdout.splitlines() if line != STOPPING] == [
        *STARTED,
        *(line for line in lines if line != STOPPING),
        "at exit",
    ]
    assert seconds < HANG_GUARD / 3


def test_process_ends_at_once_if_there_is_no_memory_to_report_a_failed_thread() -> None:
    script = """
import threading
from kproxy.app.daemon import Daemon
from kproxy.config import Config

class FailedThread:
    @property
    def thread(self):
        raise MemoryError

Daemon(Config(), None, None, None, own_log=None)._thread_failed(FailedThread())
print("still alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_GUARD, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
