"""An anonymous network namespace that cannot outlive this process.

It has no name and no bind mount. The kernel frees it, with its links and rules, as soon as the last thread, process,
socket and descriptor in it is gone, even after a `kill -9`.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

CLONE_NEWNET = 0x40000000
HANG_GUARD = 60.0
"""Seconds after which a command inside a namespace counts as hung."""

_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """An anonymous network namespace and the one thread of this process that runs in it.

    Subprocesses and sockets belong to the namespace of the thread that creates them. So this thread creates them, and
    any thread may use them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"netns-{name}")
        try:
            self.fd, self._thread = self._worker.submit(_enter_new_namespace).result()
        except OSError:
            self._worker.shutdown()
            raise

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function inside the namespace and return its result."""
        if threading.get_ident() == self._thread:
            return function()
        return self._worker.submit(function).result()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Create a socket in the namespace. It stays there, whichever thread uses it."""
        return self.call(lambda: socket.socket(family, kind, protocol))

    def run(self, argv: Sequence[str], text: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside with `text` as its input. With `check`, a failure raises `RuntimeError`."""
        done = self.call(
            lambda: subprocess.run(argv, input=text, capture_output=True, text=True, timeout=HANG_GUARD, check=False)
        )
        if check and done.returncode != 0:
            command = " ".join(argv)
            raise RuntimeError(f"{command} in {self.name}: exit code {done.returncode}: {done.stderr.strip()}")
        return done

    def popen(self, argv: Sequence[str], output: IO[str]) -> subprocess.Popen[str]:
        """Start a command inside that is killed when this process exits.

        The parent-death signal is sent when the thread that started the child exits (prctl(2)).
        """
        guarded = ["setpriv", "--pdeathsig", "KILL", *argv]
        return self.call(
            lambda: subprocess.Popen(
                guarded, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True, close_fds=True
            )
        )

    def sysctl(self, **values: int) -> None:
        """Set sysctls below `net`, written as `ipv4__conf__all__rp_filter=0`."""

        def write() -> None:
            for key, value in values.items():
                Path("/proc/sys/net", *key.split("__")).write_text(str(value))

        self.call(write)

    def close(self) -> None:
        """Release the namespace. Processes started by `popen` are killed."""
        self._worker.shutdown()
        os.close(self.fd)


def _enter_new_namespace() -> tuple[int, int]:
    if _libc.unshare(CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot create a network namespace: {os.strerror(code)} (needs CAP_SYS_ADMIN)")
    # /proc/self is the main thread, which stays in the original namespace.
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), threading.get_ident()
