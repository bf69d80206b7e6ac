"""Base chains: at which hook the kernel runs them, and in which order."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from kproxy.simulate.nftables_words import Words
from kproxy.simulate.packet import UnknownRuleError

_HOOKS = {"filter": ("prerouting", "input", "forward", "output"), "nat": ("prerouting", "output", "postrouting")}
_NAT = {"prerouting": -100, "output": -100, "postrouting": 100}
"""Where the kernel runs all chains of type nat (enum nf_ip_hook_priorities)."""

_NAMES = {("dstnat", "prerouting"): -100, ("srcnat", "postrouting"): 100}
_FILTER_NAMES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
_CONNTRACK = -200
"""Chains of this priority and before it see packets of which the connection is not known yet."""


class Base(Struct, frozen=True):
    """What makes a chain a base chain: who runs it and when, and what becomes of a packet at its end."""

    type: Literal["filter", "nat"]
    hook: str
    priority: int
    drops: bool

    @property
    def order(self) -> tuple[int, int]:
        """The place among the base chains of the hook. Priorities of type nat only order such chains."""
        return (_NAT[self.hook] if self.type == "nat" else self.priority, self.priority)


def read_base(words: Words) -> Base:
    """Take what follows `type`, such as `nat hook output priority -100; policy accept;`."""
    kind = words.next()
    words.expect("hook")
    hook = words.next()
    if hook not in _HOOKS.get(kind, ()):
        raise UnknownRuleError(f"type {kind} at hook {hook} is not known")
    words.expect("priority")
    priority = _read_priority(words, hook)
    if priority <= _CONNTRACK:
        raise UnknownRuleError(f"priority {priority}, before connections are known, is not known")
    words.expect(";", "policy")
    policy = words.next()
    if policy not in ("accept", "drop"):
        raise UnknownRuleError(f"policy {policy} is not known")
    words.expect(";")
    words.end()
    return Base("nat" if kind == "nat" else "filter", hook, priority, policy == "drop")


def _read_priority(words: Words, hook: str) -> int:
    """Take a number, or a name that may have a number added or taken away."""
    if not words.sees_name():
        return words.number()
    name = words.next()
    known = _FILTER_NAMES.get(name, _NAMES.get((name, hook)))
    if known is None:
        raise UnknownRuleError(f"priority {name} at hook {hook} is not known")
    if words.take("+"):
        return known + words.number()
    return known - words.number() if words.take("-") else known
