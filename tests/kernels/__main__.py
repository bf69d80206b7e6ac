"""Run a selection of the kernel tests on stock kernels of Debian, each in QEMU with the files of this machine.

KVM is not needed. One line is printed for each kernel and check, and a table of all at the end. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kernels.boot import booted
from tests.kernels.checks import SELECTED
from tests.kernels.fetch import MIRROR, FetchError, fetch
from tests.kernels.guest import LINES
from tests.kernels.report import Report, table

FOLDER = Path("build/kernels")
SUITES = ("bookworm", "trixie", "sid")
SILENCE = 600.0
"""Seconds without a result after which the guest counts as hung. No test takes a tenth of it."""

POLL_SECONDS = 0.5


def main() -> None:
    """Run the checks. The exit code is 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument("suites", nargs="*", default=SUITES, help="suites of Debian (default: %(default)s)")
    options = parser.parse_args()
    if platform.machine() != "x86_64":
        sys.exit(f"make kernels needs a machine with the architecture x86_64, and this one has {platform.machine()}")
    _compile()
    reports, passed = [], True
    for suite in options.suites:
        try:
            reports.append(_run(suite))
        except FetchError as error:
            print(f"{suite}: FAILED: {error}", flush=True)
            passed = False
    if reports:
        print("\n".join(table(reports)))
    sys.exit(0 if passed and all(report.passed for report in reports) else 1)


def _compile() -> None:
    """Collect the tests once, so that Python need not compile them in each guest, which cannot write to the disk."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *SELECTED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}the tests of make kernels cannot be collected")


def _run(suite: str) -> Report:
    """Run all checks on the kernel of a suite. Raises `FetchError`."""
    kernel = fetch(suite, FOLDER / suite, os.environ.get("MIRROR", MIRROR))
    results = (FOLDER / suite / "results").absolute()
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    report, started = Report(suite, kernel.release), time.monotonic()
    with booted(kernel, results) as process:
        for line in _lines(results / LINES, process):
            _print(report.add(line))
    _print(report.finish())
    _print([f"{suite} {kernel.release}: {time.monotonic() - started:.0f} s, output in {results}"])
    return report


def _lines(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the lines that the guest writes, until QEMU ends or the guest hangs."""
    read, deadline = 0, time.monotonic() + SILENCE
    while True:
        ended = process.poll() is not None
        text = path.read_text() if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        new = complete[read:].splitlines()
        read = len(complete)
        yield from map(json.loads, new)
        if new:
            deadline = time.monotonic() + SILENCE
        if ended or time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
