"""Modules of the benchmark that run as processes of their own, so that their work is not the daemon's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Self

from tests.lab.namespace import Namespace

ROOT = Path(__file__).parents[2]


class Companion:
    """A module, run as a program inside a namespace. Use it in a `with`; it dies with the namespace, and so with us.

    It may be sent lines on its standard input, and answers with lines on its standard output.
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

    def send(self, line: bytes) -> None:
        """Send it a line, given without its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def answer(self) -> bytes:
        """Return its next line. Raises `RuntimeError` if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} has ended; what it said is above")
        return line
