"""The installed iptables: its variants, its rules in a namespace, and the input that it is given."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from kproxy.host.commands import first_line
from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.names import INVALID_COUNTER, LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.types import Family
from tests.lab.namespace import Namespace
from tests.recordings import GOLDEN, State, comparable

PREFIXES = {Family.IPV4: "iptables", Family.IPV6: "ip6tables"}
"""The prefix of the program names of each family."""

PROGRAMS = tuple(f"{prefix}{end}" for prefix in PREFIXES.values() for end in ("", "-save", "-restore"))


def add_counters(namespace: Namespace) -> None:
    """Create the nfacct counters that kproxy's rules refer to."""
    namespace.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))


def restore_recording(namespace: Namespace, scenario: str) -> None:
    """Restore the rules recorded from kube-proxy in iptables mode, without flushing existing ones."""
    add_counters(namespace)
    for prefix in PREFIXES.values():
        namespace.run([f"{prefix}-restore", "--noflush"], (GOLDEN / scenario / f"{prefix}-save.txt").read_text())


def current_rules(namespace: Namespace, family: Family) -> State:
    """Return the rules of a family as the iptables in PATH lists them."""
    return comparable(namespace.run([f"{PREFIXES[family]}-save"]).stdout.splitlines())


def programs_of(variant: str) -> dict[str, str]:
    """Return the programs of a variant ("nft" or "legacy") by their names without the variant."""
    return {name: name.replace("tables", f"tables-{variant}") for name in PROGRAMS}


def missing_variant(variant: str, namespace: Namespace) -> str:
    """Return why a variant does not work on this machine, in one line, or "" if it works."""
    absent = [program for program in programs_of(variant).values() if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found: it is in the Debian package iptables"
    done = namespace.run([f"iptables-{variant}-restore", "--noflush"], "*nat\nCOMMIT\n", check=False)
    return f"{variant} iptables does not work on this machine: {first_line(done.stderr)}" if done.returncode else ""


def link_programs(programs: Mapping[str, str], folder: Path) -> None:
    """Link programs into a folder under other names. Skips the test if a program is missing."""
    for name, real in programs.items():
        found = shutil.which(real)
        if found is None:
            pytest.skip(f"{real} is not installed")
        (folder / name).symlink_to(found)


class RealKernel:
    """The rules of one family in a namespace, through one variant of iptables."""

    def __init__(self, namespace: Namespace, family: Family, variant: str) -> None:
        self._namespace = namespace
        self._prefix = f"{PREFIXES[family]}-{variant}"

    def restore(self, text: str) -> None:
        """Restore without flushing. Raises `RuntimeError` if iptables rejects the input."""
        self._namespace.run([f"{self._prefix}-restore", "--noflush"], text)

    def lines(self) -> list[str]:
        """Return the lines of iptables-save."""
        return self._namespace.run([f"{self._prefix}-save"]).stdout.splitlines(keepends=True)

    def state(self) -> State:
        """Return the rules in comparable form."""
        return comparable(self.lines())


class RecordingIptables(IptablesRunner):
    """The iptables in PATH, with a record of its inputs."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        self.inputs: list[str] = []

    def restore_each(self, texts: Iterable[str]) -> None:
        """Restore each text and record it."""
        super().restore_each(self._recorded(texts))

    def _recorded(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.inputs.append(text)
            yield text
