"""Parse the output of iptables-legacy-save. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

from kproxy.host.observed import BaseChain

_HOOKS = {"INPUT": "input", "FORWARD": "forward", "OUTPUT": "output"}
_COMMENT = re.compile(r'-m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+) ?')
_NO_CONDITION = re.compile(r"-j \S+(?: --reject-with \S+)?")
_TARGET = re.compile(r" -[jg] (\S+)")
_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject"}


class LegacyRules(Struct, frozen=True):
    """The built-in chains of table filter, all other chains as pairs of table and name, and the number of rules."""

    base: tuple[BaseChain, ...] = ()
    chains: tuple[tuple[str, str], ...] = ()
    rules: int = 0


class _BuiltIn(Struct):
    """What is known so far about a built-in chain of table filter."""

    policy: str
    final: str = ""
    accepts: bool = False
    jumps: tuple[str, ...] = ()

    def add(self, rule: str) -> None:
        """Take the next rule into account, given without its chain."""
        rule = _COMMENT.sub("", rule.strip())
        found = _TARGET.search(f" {rule}")
        target = found[1] if found else ""
        if self.final or not target:
            return
        if target in _VERDICTS and _NO_CONDITION.fullmatch(rule.strip()):
            self.final = _VERDICTS[target]
        elif target == "ACCEPT":
            self.accepts = True
        elif target not in _VERDICTS and target != "LOG":
            self.accepts = True
            self.jumps = tuple(dict.fromkeys([*self.jumps, target]))


def parse_legacy_save(lines: Iterable[str], family: str) -> LegacyRules:
    """Return what matters of the rules of one family, `ip` or `ip6`."""
    table, rules = "", 0
    chains: list[tuple[str, str]] = []
    built_in: dict[str, _BuiltIn] = {}
    for line in lines:
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            if policy == "-":
                chains.append((table, name))
            elif table == "filter" and name in _HOOKS:
                built_in[name] = _BuiltIn(policy.lower())
        elif line.startswith("-A "):
            rules += 1
            _, name, rest = line.split(" ", 2)
            if table == "filter" and name in built_in:
                built_in[name].add(rest)
    base = (
        BaseChain(
            family,
            "filter",
            name,
            _HOOKS[name],
            0,
            each.policy,
            each.final,
            each.accepts,
            each.jumps,
            legacy=True,
        )
        for name, each in built_in.items()
    )
    return LegacyRules(tuple(base), tuple(chains), rules)
