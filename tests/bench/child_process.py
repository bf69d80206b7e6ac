"""Modules of the benchmark that run in child processes, so that their CPU time does not count as the daemon's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.lab.namespace import Namespace

ROOT = Path(__file__).parents[2]


class ChildProcess:
    """A module that runs as a program in a network namespace. Use it as a context manager.

    The process reads lines from standard input and replies with lines on standard output. The kernel kills it when the
    namespace's thread exits, so it cannot outlive the benchmark.
    """

    def __init__(self, namespace: Namespace, module: str, *arguments: str) -> None:
        self._namespace = namespace
        self._module = module
        self._argv = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", module, *arguments]
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = self._namespace.call(lambda: subprocess.Popen(self._argv, stdin=pipe, stdout=pipe, cwd=ROOT))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def write_line(self, line: bytes) -> None:
        """Send one line, given without its newline."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def read_line(self) -> bytes:
        """Return the next line of output. Raises `RuntimeError` if the process has exited."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} exited unexpectedly; see its output above")
        return line
