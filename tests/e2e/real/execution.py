"""Commands in containers, through the API server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.e2e.waiting import HANG_GUARD

OUT, ERR, STATUS = 1, 2, 3
"""Channels of the protocol v4.channel.k8s.io: what the command prints, and the Status that tells how it ended."""


class ExecutionError(Exception):
    """A command could not be run, was cut off, or ended with another code than 0."""


class Execution:
    """A command that runs. Its lines are read as they come."""

    def __init__(self, socket: Any, what: str) -> None:
        self._socket, self._what = socket, what
        self._rest = ""
        self._complaints = ""
        self._status = ""

    def line(self, guard: float = HANG_GUARD) -> str | None:
        """Return the next line, None after the last. Raises `ExecutionError`, or `TimeoutError` after `guard` s."""
        deadline = time.monotonic() + guard
        while "\n" not in self._rest:
            if not self._socket.is_open():
                return self._last_line()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._what}: no line within {guard:.0f} s")
            self._take()
        line, _, self._rest = self._rest.partition("\n")
        return line

    def lines(self) -> Iterator[str]:
        """Yield all lines, until the command has ended well."""
        while (line := self.line()) is not None:
            yield line

    def write(self, text: str) -> None:
        """Send to the command's standard input."""
        self._socket.write_stdin(text)

    def close(self) -> None:
        """Leave the command to itself."""
        self._socket.close()

    def _take(self) -> None:
        try:
            self._socket.update(timeout=1)
            self._collect()
        except Exception as error:
            raise ExecutionError(f"{self._what}: {error}") from error

    def _collect(self) -> None:
        self._rest += self._socket.read_channel(OUT)
        self._complaints += self._socket.read_channel(ERR)
        self._status += self._socket.read_channel(STATUS)

    def _last_line(self) -> str | None:
        self._collect()
        if self._rest:
            line, _, self._rest = self._rest.partition("\n")
            return line
        self._socket.close()
        if not self._status:
            raise ExecutionError(f"{self._what}: cut off; {self._complaints.strip()}")
        status = json.loads(self._status)
        if status.get("status") != "Success":
            raise ExecutionError(f"{self._what}: {status.get('message', status)}; {self._complaints.strip()}")
        return None


class Executor:
    """Runs commands in containers, from any thread."""

    def __init__(self, configuration: Any) -> None:
        """Take the `kubernetes` package's Configuration."""
        from kubernetes.client import ApiClient, CoreV1Api

        self._api = CoreV1Api(ApiClient(configuration))
        self._lock = threading.Lock()

    def start(self, namespace: str, pod: str, script: str, *arguments: object, stdin: bool = False) -> Execution:
        """Start a bash script in a pod. Raises `ExecutionError`."""
        from kubernetes.stream import stream

        command = ["bash", "-c", script, "bash", *map(str, arguments)]
        what = f"pod {namespace}/{pod}: {_short(script)} {' '.join(command[4:])}"
        # For as long as it connects, the package changes the client's method, and so all its users.
        with self._lock:
            try:
                socket = stream(
                    self._api.connect_get_namespaced_pod_exec,
                    pod,
                    namespace,
                    command=command,
                    stdin=stdin,
                    stdout=True,
                    stderr=True,
                    tty=False,
                    _preload_content=False,
                )
            except Exception as error:
                raise ExecutionError(f"{what}: {error}") from error
        return Execution(socket, what)

    def lines(self, namespace: str, pod: str, script: str, *arguments: object) -> list[str]:
        """Run a bash script in a pod and return what it printed. Raises `ExecutionError`."""
        return list(self.start(namespace, pod, script, *arguments).lines())


def _short(script: str) -> str:
    lines: Sequence[str] = script.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ..."
