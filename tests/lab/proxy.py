"""The installed `kproxy` command, run on a node of the lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.lab.topology import NODE, Lab
from tests.lab.waiting import HANG_GUARD

KPROXY = str(Path(sys.executable).with_name("kproxy"))
CLUSTER_CIDR = "10.244.0.0/16,fd00:10:244::/48"
FLAGS = (
    f"--hostname-override={NODE}",
    f"--cluster-cidr={CLUSTER_CIDR}",
    "--proxy-mode=iptables",
    "--conntrack-max-per-core=0",  # a setting of the whole machine, which is not the lab's to change
    "--conntrack-min=0",
)


def apply(lab: Lab, objects: Path, *flags: str) -> None:
    """Program the objects on the lab's node; raises with what kproxy said if it did not work."""
    lab.node.namespace.run([KPROXY, "apply", f"--objects={objects}", *FLAGS, *flags])


class Daemon:
    """`kproxy run` on the lab's node, until it is left (use it in a `with`), and never longer than we live."""

    def __init__(self, lab: Lab, objects: Path, log: Path, *flags: str) -> None:
        self._lab = lab
        self._log = log
        self._command = [KPROXY, "run", f"--objects={objects}", *FLAGS, *flags]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Daemon:
        with self._log.open("w") as output:
            self._process = self._lab.node.namespace.popen(self._command, output)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(HANG_GUARD)
        finally:
            self._process.kill()

    @property
    def command(self) -> str:
        """The command line, for humans."""
        return " ".join(["kproxy", *self._command[1:]])

    def is_up(self) -> bool:
        """Return True while the daemon runs; raise with its own last words if it has ended."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            words = self._log.read_text().strip().splitlines() or ["(it said nothing)"]
            raise RuntimeError(f"kproxy ended with exit code {code}: {words[-1]}")
        return True
