"""A node with a running daemon whose rules are damaged, and the programs that do the damage."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from kproxy.model.types import Family
from tests.drift_times import victims
from tests.drift_times.damages import Damage, fill
from tests.drift_times.kernel_state import ALL, IptablesState, NftablesState, State
from tests.lab.connection_load import AddressServers
from tests.lab.iptables import PREFIXES, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import FLAGS, KPROXY
from tests.lab.topology import Lab

STRANGER = "stranger"
"""The beginning of the names of the programs that do the damage."""

QUIET = ("--iptables-sync-period=12h", "--iptables-min-sync-period=1s")
"""No periodic check during a run, so that only a notification can lead to a repair."""

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
            self._make_programs()
            victims.write(self._folder / "objects.json", self.services)
            self._states = {family: self._state(family) for family in Family}
            stack.callback(self.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def _variant(self) -> str:
        return self.mode.removeprefix("iptables-")

    def _make_programs(self) -> None:
        self._programs.mkdir()
        variant = "nft" if self.mode == "nftables" else self._variant
        link_programs(programs_of(variant), self._programs)
        for name, real in ((STRANGER, f"xtables-{variant}-multi"), (f"{STRANGER}-nft", "nft")):
            found = shutil.which(real)
            assert found is not None
            (self._programs / name).symlink_to(os.path.realpath(found))

    def _state(self, family: Family) -> IptablesState | NftablesState:
        if self.mode == "nftables":
            return NftablesState(self.node, family)
        return IptablesState(self.node, family, f"{PREFIXES[family]}-{self._variant}")

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
        if self._variant == "legacy":
            for prefix in PREFIXES.values():
                for table in ("nat", "filter", "mangle"):
                    self.node.run([f"{prefix}-legacy-restore"], f"*{table}\nCOMMIT\n")

    def is_up(self) -> bool:
        """Return whether the daemon runs."""
        return self._process is not None and self._process.poll() is None

    def read(self, family: Family, parts: tuple[str, ...] = ALL) -> State:
        """Return the rules of a family, or some parts of them."""
        return self._states[family].read(parts)

    def names(self, damage: Damage, family: Family, turn: int) -> dict[str, str]:
        """Return what the names in a command stand for. Damages of plain Services affect a different one each turn."""
        number = victims.number_of(damage.service, turn, self.services)
        text = self._states[family].text()
        found = victims.addresses(number, family)
        found |= (victims.nftables_names if self.mode == "nftables" else victims.iptables_names)(number, text)
        prefix, stranger = PREFIXES[family], self._programs / STRANGER
        found |= {"iptables": f"{stranger} {prefix}", "restore": f"{stranger} {prefix}-restore"}
        return found | {"save": f"{stranger} {prefix}-save", "nft": f"{stranger}-nft"}

    def damage(self, command: str) -> None:
        """Run a command of the other program. Raises `RuntimeError` if it fails."""
        self.node.run(["sh", "-ec", f"cd {self._folder}; export XTABLES_LOCKFILE={self._folder / 'lock'}\n{command}"])

    @staticmethod
    def parts(damage: Damage, names: dict[str, str]) -> tuple[str, ...]:
        """Return the parts that a damage changes."""
        return tuple(fill(part, names) for part in damage.parts)

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
