"""The rules in the kernel in a form that two readings can be compared in: all of them, or single parts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeAlias

from kproxy.iptables.names import DISPATCH_CHAINS
from kproxy.model.types import Family
from tests.lab.iptables import PREFIXES
from tests.lab.namespace import Namespace
from tests.recordings import NODEPORTS_COMMENT

State: TypeAlias = dict[str, list[str]]
"""The lines of each part of the rules, by its name."""

ALL = ("all",)
_BLOCK = re.compile(r"^\t(chain|map|set) (\S+) \{\n(.*?)^\t\}", re.DOTALL | re.MULTILINE)
_ELEMENTS = re.compile(r"elements = \{(.*?)\}", re.DOTALL)
_FIREWALL = " -j KUBE-FIREWALL"
_UNSORTED = {f"{chain.table} {chain.name}" for chain in DISPATCH_CHAINS}


class IptablesState:
    """The rules of iptables mode in one variant of iptables, without counters."""

    def __init__(self, node: Namespace, family: Family, program: str = "") -> None:
        self._node = node
        self._program = program or PREFIXES[family]

    def read(self, parts: Iterable[str] = ALL) -> State:
        """Return the chains `<table> <chain>` with their policies and rules, or all chains of all tables."""
        if tuple(parts) == ALL:
            return parse_save(self._node.run([f"{self._program}-save"], check=False).stdout)
        return {part: _ordered(part, self._chain(*part.split())) for part in parts}

    def text(self) -> str:
        """Return all rules as iptables-save prints them."""
        return self._node.run([f"{self._program}-save"]).stdout

    def _chain(self, table: str, chain: str) -> list[str]:
        done = self._node.run([self._program, "-t", table, "-S", chain], check=False)
        return done.stdout.splitlines() if done.returncode == 0 else ["absent"]


def parse_save(saved: str) -> State:
    """Parse the output of iptables-save. Rules in dispatch chains are sorted, because their order has no meaning."""
    found: State = {}
    table = ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain, policy = line[1:].split()[:2]
            found.setdefault(f"{table} {chain}", []).insert(0, policy)
        elif line.startswith("-A "):
            found.setdefault(f"{table} {line.split()[1]}", []).append(line)
    return {part: _ordered(part, lines) for part, lines in found.items()}


def _ordered(part: str, lines: list[str]) -> list[str]:
    return sorted(lines, key=lambda line: (NODEPORTS_COMMENT in line, line)) if part in _UNSORTED else lines


class NftablesState:
    """The table of nftables mode of one family, without handles, counters and the elements of dynamic sets."""

    def __init__(self, node: Namespace, family: Family) -> None:
        self._node = node
        self._table = (("ip" if family is Family.IPV4 else "ip6"), "kube-proxy")

    def read(self, parts: Iterable[str] = ALL) -> State:
        """Return all chains, sets and maps. With `parts`, return all chains, but only these sets and elements."""
        if tuple(parts) == ALL:
            return parse_table(self.text())
        found = parse_table(self._list("-t"))
        for part in parts:
            kind, _, rest = part.partition(" ")
            if kind == "set":
                found |= parse_table(self._set(rest))
            elif kind == "element":
                done = self._node.run(["nft", "get", "element", *self._table, rest], check=False)
                found[part] = [_ELEMENTS.search(done.stdout)[1].strip()] if done.returncode == 0 else []  # type: ignore[index]
        return found

    def _set(self, name: str) -> str:
        """Return a set or map, or "" if it does not exist."""
        commands = (["nft", "-s", "list", kind, *self._table, name] for kind in ("set", "map"))
        return next(
            (done.stdout for each in commands if not (done := self._node.run(each, check=False)).returncode), ""
        )

    def text(self) -> str:
        """Return the table as nft prints it."""
        return self._list()

    def _list(self, *flags: str) -> str:
        return self._node.run(["nft", "-s", *flags, "list", "table", *self._table], check=False).stdout


def parse_table(listed: str) -> State:
    """Parse the output of `nft list table`. Elements are sorted."""
    found: State = {
        "table": [line.strip() for line in listed.splitlines() if line.startswith(("table", "\tcomment", "\tflags"))]
    }
    for kind, name, body in _BLOCK.findall(listed):
        if kind == "chain":
            found[f"chain {name}"] = [line.strip() for line in body.splitlines()]
            continue
        head = [line.strip() for line in _ELEMENTS.sub("", body).splitlines() if line.strip()]
        elements = _ELEMENTS.search(body)
        if elements and "dynamic" not in body:
            head += sorted(" ".join(each.split()) for each in re.split(r",\s", elements[1]))
        found[f"set {name}"] = head
    return found


def without_jumps_to_firewall(state: State) -> State:
    """Drop the jumps to KUBE-FIREWALL.

    They stay when kproxy switches to nftables mode, so their position among the other rules depends on the past.
    """
    return {part: [line for line in lines if not line.endswith(_FIREWALL)] for part, lines in state.items()}


def difference(before: State, after: State, title: str) -> str:
    """Return the lines that were removed and added, below a title."""
    lines = [f"== {title}"]
    for part in differing(before, after):
        compared = difflib.unified_diff(before.get(part, []), after.get(part, []), n=0, lineterm="")
        lines += [f"{part}:", *(line for line in compared if not line.startswith(("---", "+++", "@@")))]
    return "\n".join(lines)


def differing(one: State, other: State) -> list[str]:
    """Return the names of the parts that differ."""
    return sorted(part for part in one.keys() | other.keys() if one.get(part) != other.get(part))
