"""Run commands in containers through the API server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tests.e2e.waiting import HANG_GUARD

OUT, ERR, STATUS = 1, 2, 3
"""Channels of the protocol v4.channel.k8s.io: stdout, stderr and the final Status."""


class ExecutionError(Exception):
    """A command could not be run, was interrupted, or exited with a non-zero code."""


class Execution:
    """A running command. Its output is read line by line."""

    def __init__(self, socket: Any, description: str) -> None:
        self._socket, self._description = socket, description
        self._rest = ""
        self._stderr = ""
        self._status = ""

    def line(self, guard: float = HANG_GUARD) -> str | None:
        """Return the next line, None after the last. Raises `ExecutionError`, or `TimeoutError` after `guard` s."""
        deadline = time.monotonic() + guard
        while "\n" not in self._rest:
            if not self._socket.is_open():
                return self._last_line()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._description}: no line within {guard:.0f} s")
            self._receive()
        line, _, self._rest = self._rest.partition("\n")
        return line

    def lines(self) -> Iterator[str]:
        """Yield all lines. Raises `ExecutionError` if the command fails."""
        while (line := self.line()) is not None:
            yield line

    def write(self, text: str) -> None:
        """Write to the command's standard input."""
        self._socket.write_stdin(text)

    def close(self) -> None:
        """Close the connection. The command may keep running."""
        self._socket.close()

    def _receive(self) -> None:
        try:
            self._socket.update(timeout=1)
            self._collect()
        except Exception as error:
            raise ExecutionError(f"{self._description}: {error}") from error

    def _collect(self) -> None:
        self._rest += self._socket.read_channel(OUT)
        self._stderr += self._socket.read_channel(ERR)
        self._status += self._socket.read_channel(STATUS)

    def _last_line(self) -> str | None:
        self._collect()
        if self._rest:
            line, _, self._rest = self._rest.partition("\n")
            return line
        self._socket.close()
        if not self._status:
            raise ExecutionError(f"{self._description}: connection lost; {self._stderr.strip()}")
        status = json.loads(self._status)
        if status.get("status") != "Success":
            raise ExecutionError(f"{self._description}: {status.get('message', status)}; {self._stderr.strip()}")
        return None


class Executor:
    """Runs commands in containers, from any thread."""

    def __init__(self, configuration: Any) -> None:
        """`configuration` is a Configuration of the `kubernetes` package."""
        from kubernetes.client import ApiClient, CoreV1Api

        self._api = CoreV1Api(ApiClient(configuration))
        self._lock = threading.Lock()

    def start(self, namespace: str, pod: str, script: str, *arguments: object, stdin: bool = False) -> Execution:
        """Start a bash script in a pod. Raises `ExecutionError`."""
        from kubernetes.stream import stream

        command = ["bash", "-c", script, "bash", *map(str, arguments)]
        description = f"pod {namespace}/{pod}: {_short(script)} {' '.join(command[4:])}"
        # `stream` patches the client while it connects, which would affect other threads.
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
                raise ExecutionError(f"{description}: {error}") from error
        return Execution(socket, description)

    def lines(self, namespace: str, pod: str, script: str, *arguments: object) -> list[str]:
        """Run a bash script in a pod; return its output. Raises `ExecutionError`."""
        return list(self.start(namespace, pod, script, *arguments).lines())


def _short(script: str) -> str:
    lines: Sequence[str] = script.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ..."
