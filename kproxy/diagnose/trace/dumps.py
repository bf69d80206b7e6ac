"""Recognize dumps of rules and combine them into one program. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec

from kproxy.diagnose.trace.iptables_save import (
    IPTABLES_TABLES,
    family_of_save,
    is_iptables_save,
    read_iptables_save,
)
from kproxy.diagnose.trace.nft_rules import read_nft
from kproxy.diagnose.trace.nft_text import is_nft_text, read_nft_text
from kproxy.diagnose.trace.program import Program
from kproxy.model.types import Family

Json: TypeAlias = Any
_DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError)
"""The errors while reading objects that are not complete."""
_OWNERS = {"ip": "iptables", "ip6": "ip6tables"}
_BUILT_IN = {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}


class DumpError(ValueError):
    """A dump has no known format. The message is one line."""


class Dumps:
    """The rules of a node from one or more dumps, whatever wrote them."""

    def __init__(self) -> None:
        self._iptables = Program()
        self._nft: list[Json] = []
        self._nft_tables: set[tuple[str, str]] = set()
        self._nft_variants: set[Family] = set()
        self._notes: list[str] = []

    def add(self, text: str, name: str, family: Family | None = None) -> None:
        """Add a dump: the output of `iptables-save`, `ip6tables-save`, `nft list ruleset` or `nft -j list ruleset`.

        `family` is the IP family of a dump of iptables-save if it is known. Of a dump of nft, the tables of the other
        family are then ignored. Raises `DumpError`.
        """
        stripped = text.lstrip("\ufeff \t\r\n")
        if stripped.startswith("{"):
            self._add_json(stripped, name, family)
        elif is_iptables_save(text):
            self._add_iptables(text, name, family)
        elif is_nft_text(text):
            try:
                self._add_nft(read_nft_text(text), name, family)
            except _DAMAGED as error:
                raise DumpError(f"{name}: not the complete output of `nft list ruleset`: {error}") from None
        elif stripped:
            raise DumpError(
                f"{name}: neither the output of iptables-save nor of `nft list ruleset`: it begins with "
                f"{stripped.splitlines()[0][:60]!r}"
            )

    def _add_json(self, text: str, name: str, family: Family | None) -> None:
        try:
            objects = msgspec.json.decode(text)["nftables"]
            self._add_nft([entry for entry in objects if isinstance(entry, dict)], name, family)
        except (msgspec.DecodeError, *_DAMAGED) as error:
            raise DumpError(f"{name}: not the output of `nft -j list ruleset`: {error}") from None

    def _add_nft(self, objects: list[Json], name: str, family: Family | None) -> None:
        """Add the objects of a dump, except for tables that an earlier dump has shown."""
        if family is not None:
            other = "ip" if family is Family.IPV6 else "ip6"
            objects = [entry for entry in objects if _place(entry)[0] != other]
        tables = {(entry["table"]["family"], entry["table"]["name"]) for entry in objects if "table" in entry}
        repeated = tables & self._nft_tables
        self._nft.extend(entry for entry in objects if _place(entry) not in repeated)
        self._nft_tables |= tables
        self._notes.extend(
            f"{name}: table {' '.join(each)} is ignored: another dump has it" for each in sorted(repeated)
        )

    def _add_iptables(self, text: str, name: str, family: Family | None) -> None:
        for part, own in _parts(text):
            found = family or own or family_of_save(part)
            if found is None:
                raise DumpError(
                    f"{name}: IPv4 or IPv6? Keep the comment of iptables-save or ip6tables-save at the beginning"
                )
            if "(nf_tables)" in part:
                self._nft_variants.add(found)
            self._iptables.add(read_iptables_save(part, found))

    def has_saved(self, family: str, table: str) -> bool:
        """Return whether a dump of iptables-nft has a table, named as in nftables. `family` is nft's name of it."""
        if (Family.IPV6 if family == "ip6" else Family.IPV4) not in self._nft_variants:
            return False
        return any(key[:2] == (_OWNERS.get(family), table) for key in self._iptables.chains)

    def program(self) -> Program:
        """Return the program of all dumps. Raises `DumpError` if one of them is damaged.

        `nft list ruleset` also shows the tables of iptables-nft. If they are in a dump of iptables-save too, that dump
        is used, because nft cannot show all of iptables' matches.
        """
        program = Program(notes=list(self._notes))
        program.add(self._iptables)
        try:
            remaining = list(self._without_duplicates())
            program.add(read_nft(remaining))
        except _DAMAGED as error:
            raise DumpError(f"the output of `nft list ruleset` has an unexpected form: {error!r}") from None
        if any("xt" in statement for entry in remaining for statement in entry.get("rule", {}).get("expr", ())):
            program.notes.append(
                "nft shows the matches and targets of iptables without their options: add a dump of iptables-save"
            )
        return program

    def _without_duplicates(self) -> Iterable[Json]:
        built_in: set[tuple[str, str]] = set()
        for entry in self._nft:
            chain = entry.get("chain")
            if chain and chain["name"] in _BUILT_IN and "hook" in chain and chain["table"] in IPTABLES_TABLES:
                built_in.add((chain["family"], chain["table"]))
        hidden = {place for place in built_in if self.has_saved(*place)}
        for entry in self._nft:
            if _place(entry) not in hidden:
                yield entry


def _place(entry: Json) -> tuple[str, str]:
    """Return the family and name of the table to which an object belongs."""
    ((_, content),) = list(entry.items())[:1]
    return content.get("family", ""), content.get("table", content.get("name", ""))


def _parts(text: str) -> list[tuple[str, Family | None]]:
    """Split the concatenated output of iptables-save and ip6tables-save into parts with their IP family."""
    parts: list[tuple[list[str], Family | None]] = []
    current: Family | None = None
    for line in text.splitlines():
        if line.startswith("# Generated by "):
            current = Family.IPV6 if "ip6tables" in line else Family.IPV4
        if not parts or (line.startswith("# Generated by ") and parts[-1][1] is not current):
            parts.append(([], current))
        parts[-1][0].append(line)
    return [("\n".join(lines) + "\n", family) for lines, family in parts if any(line.strip() for line in lines)]
