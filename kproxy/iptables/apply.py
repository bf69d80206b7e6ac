"""Talking to the kernel through `iptables-restore` and `iptables-save`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager

from msgspec import Struct

from kproxy.host.run import CommandError, Completed, Programs, first_line
from kproxy.iptables.names import Chain
from kproxy.iptables.text import parse_rules
from kproxy.model.types import Family

LOCK_WAIT_SECONDS = 5
"""How long one attempt waits for the xtables lock, which iptables-legacy takes for every change."""

HANG_SECONDS = 900
"""After this an iptables program counts as hanging. The longest honest run known took 150 s."""


class RestoreError(Exception):
    """The kernel did not accept a change of a table: nothing of it is in force, nor of the tables after it.

    `line` is the offending line of the input where iptables could tell, else "".
    """

    def __init__(self, message: str, *, line: str = "") -> None:
        super().__init__(message)
        self.line = line


class IptablesVersion(Struct, frozen=True):
    """What `iptables --version` says: its version, and whether it speaks to nf_tables or to x_tables."""

    number: tuple[int, ...]
    nft: bool

    @property
    def random_fully(self) -> bool:
        """Whether MASQUERADE knows `--random-fully` (since 1.6.2)."""
        return self.number >= (1, 6, 2)

    def __str__(self) -> str:
        number = ".".join(map(str, self.number))
        return f"iptables {number} ({'nf_tables' if self.nft else 'legacy'})"


def parse_version(text: str) -> IptablesVersion:
    """Read `iptables v1.8.9 (nf_tables)`. Before 1.8 there was no nf_tables and no mention of it."""
    found = re.search(r"v(\d+(?:\.\d+)*)", text)
    if found is None:
        raise CommandError(f"cannot tell the version of iptables from {first_line(text)!r}")
    return IptablesVersion(tuple(int(part) for part in found[1].split(".")), nft="nf_tables" in text)


class Iptables:
    """The iptables programs of one family, as found in PATH."""

    def __init__(self, family: Family) -> None:
        self._prefix = "ip6tables" if family is Family.IPV6 else "iptables"
        self._programs = Programs()

    def stop(self) -> None:
        """End what is under way, from another thread, and do nothing any more.

        A transaction is in force as a whole or not at all; and once this returns it does not come into force later,
        when a successor may already have looked at the kernel.
        """
        self._programs.stop()

    def version(self) -> IptablesVersion:
        """Return the version of the installed iptables. Raises `CommandError`."""
        done = self._programs.run([self._prefix, "--version"], timeout=HANG_SECONDS)
        if done.code:
            raise CommandError(f"{self._prefix} --version failed: {first_line(done.stderr)}")
        return parse_version(done.stdout)

    def save(self) -> AbstractContextManager[Iterator[str]]:
        """Return all tables' rules as lines of text, read as they come. Raises `CommandError`."""
        return self._programs.reading([f"{self._prefix}-save"], timeout=HANG_SECONDS)

    def restore(self, text: str) -> None:
        """Make the changes that `text` holds, one transaction per table. Raises `RestoreError`.

        Chains that `text` does not name are left alone.
        """
        argv = [f"{self._prefix}-restore", "--noflush", "-w", str(LOCK_WAIT_SECONDS)]
        done = self._programs.run(argv, text, timeout=HANG_SECONDS)
        if done.code:
            raise restore_error(argv[0], done.code, done.stderr, text)

    def has(self, chain: Chain, rule: str) -> bool:
        """Return whether a chain has a rule, given without `-A CHAIN`. Raises `CommandError`."""
        return self._command(chain, "-C", rule)

    def exists(self, chain: Chain) -> bool:
        """Return whether there is such a chain. Raises `CommandError`."""
        return self._command(chain, "-S", "")

    def rules(self, chain: Chain) -> list[str]:
        """Return the rules of a chain in the spelling of `parse_save`, none if there is no such chain.

        Raises `CommandError`.
        """
        done = self._run(chain, "-S", "")
        return parse_rules(done.stdout) if done.code == 0 else []

    def create(self, chain: Chain) -> None:
        """Create a chain unless it exists; its rules stay. Raises `CommandError`."""
        self._command(chain, "-N", "")

    def _command(self, chain: Chain, command: str, rule: str) -> bool:
        return self._run(chain, command, rule).code == 0

    def _run(self, chain: Chain, command: str, rule: str) -> Completed:
        argv = [self._prefix, "-w", str(LOCK_WAIT_SECONDS), "-t", chain.table, command, chain.name, *shlex.split(rule)]
        return self._programs.run(argv, timeout=HANG_SECONDS)


_LINE = re.compile(r"line:? (\d+)")


def restore_error(program: str, code: int, stderr: str, text: str) -> RestoreError:
    """Return what a failed restore means: why, and at which line of its input."""
    said = [line.strip() for line in stderr.splitlines()]
    said = [line for line in said if line and not line.startswith(("Try `", "# "))]
    found = _LINE.search(stderr)
    line = ""
    if found is not None:
        lines = text.splitlines()
        number = int(found[1])
        line = lines[number - 1] if 0 < number <= len(lines) else ""
        if line == "COMMIT":  # where the kernel was asked, and not what it refused
            line = ""
    # The nf_tables variant puts its name on a line of its own before the reason.
    reason = next((each for each in said if not each.endswith("):")), first_line(stderr))
    where = f" at {line!r}" if line else ""
    return RestoreError(f"{program} failed with status {code}: {reason}{where}", line=line)
