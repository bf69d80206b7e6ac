"""A node with a running daemon whose rules are damaged, and the programs that do the damage."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from kproxy.model.types import Family
from tests.drift_times import victims
from tests.drift_times.stranger import Stranger
from tests.lab.connection_load import AddressServers
from tests.lab.iptables import PREFIXES, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import FLAGS, KPROXY
from tests.lab.topology import Lab

QUIET = ("--iptables-sync-period=12h", "--iptables-min-sync-period=1s")
"""No periodic check during a run, so that only a notification can lead to a repair."""

SMALL = 200
"""Up to this number of Services, all rules are compared. In larger clusters, only the damaged parts are."""

START_SECONDS = 600.0


class DamagedNode:
    """The node, a client and a server in namespaces, and kproxy in one of the modes. Use it as a context manager."""

    def __init__(self, mode: str, services: int, folder: Path, *flags: str) -> None:
        """`mode` is `nftables`, `iptables-nft` or `iptables-legacy`."""
        self.mode, self.services, self.log = mode, services, folder / "kproxy.log"
        self._folder, self._flags = folder, flags or QUIET
        self._programs = folder / "programs"
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            lab = stack.enter_context(Lab())
            self.node: Namespace = lab.node.namespace
            self.client = lab.add_pod("client", "10.244.1.250", "fd00:10:244:1::250")
            pods = [address for both in victims.PODS.values() for address in both]
            AddressServers(self._folder, [lab.add_pod("server", *pods).namespace], 8080)
            self.stranger = Stranger(self.node, self.mode, self._folder / "stranger", remember=self.services > SMALL)
            self._programs.mkdir()
            link_programs(programs_of(self.stranger.variant), self._programs)
            victims.write(self._folder / "objects.json", self.services)
            stack.callback(self.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _command(self, command: str) -> list[str]:
        mode = "nftables" if self.mode == "nftables" else "iptables"
        environment = [f"PATH={self._programs}:{os.environ['PATH']}", f"XTABLES_LOCKFILE={self._folder / 'lock'}"]
        objects = f"--objects={self._folder / 'objects.json'}"
        return ["env", *environment, KPROXY, command, objects, *FLAGS, f"--proxy-mode={mode}"]

    def apply(self) -> None:
        """Program the rules once."""
        self.node.run(self._command("apply"))

    def start(self) -> None:
        """Start the daemon and wait until the rules of both families are programmed and nothing changes any more."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as output:
            self._process = self.node.popen([*self._command("run"), *self._flags], output)
        self._wait(partial(self._has_synced, begin), "kproxy has synced both families")

    def stop(self) -> None:
        """Stop the daemon as a service manager does."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60.0)
            self._process = None

    def restart(self) -> None:
        """Start the daemon again. It forgets how often it has repaired each part."""
        self.stop()
        self.start()

    def start_anew(self) -> None:
        """Start the daemon on a node without rules."""
        self.stop()
        self.flush()
        self.start()

    def flush(self) -> None:
        """Remove all rules from the node."""
        self.node.run(["nft", "flush", "ruleset"])
        if self.stranger.variant == "legacy":
            for prefix in PREFIXES.values():
                for table in ("nat", "filter", "mangle"):
                    self.node.run([f"{prefix}-legacy-restore"], f"*{table}\nCOMMIT\n")

    def record(self, text: str) -> None:
        """Append a text to the file `differences.txt` beside the log."""
        with (self._folder / "differences.txt").open("a") as file:
            print(text, file=file)

    def is_up(self) -> bool:
        """Return whether the daemon runs."""
        return self._process is not None and self._process.poll() is None

    def _has_synced(self, begin: int) -> bool:
        if not self.is_up():
            raise RuntimeError(f"kproxy has exited; see {self.log}")
        lines = self.log.read_bytes()[begin:].decode().splitlines()
        return all(any(f" {family.value}: synced " in line for line in lines) for family in Family)

    def _wait(self, condition: partial[bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {START_SECONDS:.0f} s: {what}; see {self.log}")
            time.sleep(0.02)
