"""Description of the machine that the benchmark runs on, recorded with the results."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import kproxy
from tests.bench.child_process import ROOT
from tests.bench.figures import Machine


def machine() -> Machine:
    """Describe this machine. Facts that are unavailable are ""."""
    return Machine(
        kernel=platform.release(),
        cpus=len(os.sched_getaffinity(0)),
        cpu=_field("/proc/cpuinfo", "model name"),
        memory=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        python=platform.python_version(),
        iptables=_output(["iptables", "--version"]).removeprefix("iptables "),
        kproxy=kproxy.__version__,
        commit=_output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]),
        load=round(os.getloadavg()[0], 2),
    )


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _output(argv: Sequence[str]) -> str:
    if shutil.which(argv[0]) is None:
        return ""
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
