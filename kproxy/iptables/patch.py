"""Changing single rules of a long chain instead of writing it anew. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

WORTHWHILE_RULES = 4
"""Chains of fewer rules are always written anew: there is nothing to save."""
WORTHWHILE_SHARE = 3
"""A patch must have at most this part of the commands that writing a chain anew takes.

Each costs more than a rule that is written, as the rules that are there have to be read: half the commands took as
long as writing all rules.
"""
READ_PER_WRITTEN = 8
"""How many rules iptables-nft reads in the time in which it writes one."""


class ChainPatch(Struct, frozen=True):
    """How a chain gets the rules that are wanted (one per line of `rules`) by `commands` about single rules.

    These go by a rule's number in the chain, so they may only be given while it has `length` rules: that is how many
    are known, and with any other number somebody else was there. Then all of it must be written. So it must if the
    chain has not the `new_length` afterwards: then somebody else was there at the same moment.
    """

    commands: tuple[str, ...]
    length: int
    rules: str

    @property
    def new_length(self) -> int:
        """How many rules the chain has afterwards."""
        return self.rules.count("\n") + 1

    @property
    def weight(self) -> int:
        """How many written rules it is worth: all that the chain has must be read."""
        return len(self.commands) + self.length // READ_PER_WRITTEN


def patch(chain: str, held: Sequence[int], rules: str) -> ChainPatch | None:
    """Return how a chain whose rules are `held` as digests gets `rules`; None if writing it anew is as cheap.

    What both begin with stays, and after that rules come or go, so that the end keeps its distance from the last rule:
    a rule that picks one of the endpoints has a probability that depends on how many come after it.
    """
    wanted = rules.split("\n")
    if len(wanted) < WORTHWHILE_RULES:
        return None
    digests = [hash(rule) for rule in wanted]
    head = _common(held, digests)
    grown = len(digests) - len(held)
    bodies = [rule.removeprefix(f"-A {chain} ") for rule in wanted]
    if grown < 0:
        # Each moves up those after it.
        commands = [f"-D {chain} {head + 1}"] * -grown
        kept = [*held[:head], *held[head - grown :]]
    else:
        # All before the same old rule, whose number grows. The kernel knows no other place in a change than a rule
        # that was there before it, so these come before that may be replaced.
        commands = [f"-I {chain} {place + 1} {bodies[place]}" for place in range(head, head + grown)]
        kept = [*digests[: head + grown], *held[head:]]
    commands += [
        f"-R {chain} {place + 1} {bodies[place]}"
        for place, (old, new) in enumerate(zip(kept, digests, strict=True))
        if old != new
    ]
    if len(commands) * WORTHWHILE_SHARE > len(wanted):
        return None
    return ChainPatch(tuple(commands), len(held), rules)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return with how many equal values both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))
