"""Programs that cannot be started because a resource has run out: the error is temporary, and a later start works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.lab.waiting import HANG_GUARD

SCRIPT = """
import os, resource, sys
from kproxy.host.commands import CommandRunner, InconclusiveError

limit = {"descriptors": resource.RLIMIT_NOFILE, "processes": resource.RLIMIT_NPROC}[sys.argv[1]]
runner = CommandRunner()
hard = resource.getrlimit(limit)[1]
used = []


def start_programs():
    results = []
    for attempt in (
        lambda: runner.run(["true"], timeout=30),
        lambda: runner.stream_input(["cat"], ["x"], timeout=30),
        lambda: read_lines(),
    ):
        try:
            results.append(str(attempt().code))
        except InconclusiveError as error:
            results.append(type(error).__name__)
    return " ".join(results)


def read_lines():
    with runner.stream_output(["echo"], timeout=30) as lines:
        list(lines)
    return runner.run(["true"], timeout=30)


print(start_programs())
if sys.argv[1] == "processes":
    os.setresuid(65534, 65534, 65534)  # the limit does not apply to root
    resource.setrlimit(limit, (0, hard))
    print(start_programs())
    resource.setrlimit(limit, (hard, hard))
else:
    resource.setrlimit(limit, (64, hard))
    try:
        while True:
            used.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    print(start_programs())
    while used:
        os.close(used.pop())
print(start_programs())
"""


@pytest.mark.parametrize("resource", ["descriptors", "processes"])
def test_programs_start_again_when_the_resource_is_available(resource: str) -> None:
    if resource == "processes" and os.geteuid():
        pytest.skip("needs root to change the user")
    command = [sys.executable, "-c", SCRIPT, resource]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD, check=False)
    temporary = " ".join(["InconclusiveError"] * 3)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["0 0 0", temporary, "0 0 0"]), done.stderr
