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


class Patch(Struct, frozen=True):
    """How a chain gets the rules that are wanted (one per line of `rules`) by `commands` about single rules.

    These go by a rule's number in the chain, so they may only be given while it has `length` rules: that is how many
    are known, and with any other number somebody else was there. Then all of it must be written.
    """

    commands: tuple[str, ...]
    length: int
    rules: str


def patch(chain: str, held: Sequence[int], rules: str) -> Patch | None:
    """Return how a chain whose rules are `held` as digests gets `rules`; None if writing it anew is as cheap.

    What both begin and end with stays. Of what is between, the end is kept in its place and so the begin grows or
    shrinks: a rule that picks one of the endpoints has a probability that depends on how many come after it.
    """
    wanted = rules.split("\n")
    if min(len(held), len(wanted)) < WORTHWHILE_RULES:
        return None
    digests = [hash(rule) for rule in wanted]
    head = _common(held, digests, min(len(held), len(digests)))
    tail = _common(held[::-1], digests[::-1], min(len(held), len(digests)) - head)
    grown = len(digests) - len(held)
    bodies = [rule.removeprefix(f"-A {chain} ") for rule in wanted]
    places = range(head + 1, head + 1 + abs(grown))
    if grown < 0:
        # Each moves up those after it.
        commands = [f"-D {chain} {head + 1}" for _ in places]
        kept = [*held[:head], *held[head - grown :]]
    else:
        # All before the same old rule, whose number grows. The kernel knows no other place in a change than a rule
        # that was there before it, so these come before that may be replaced.
        commands = [f"-I {chain} {place} {bodies[place - 1]}" for place in places]
        kept = [*digests[: head + grown], *held[head:]]
    commands += [
        f"-R {chain} {place} {bodies[place - 1]}"
        for place in range(head + max(grown, 0) + 1, len(digests) - tail + 1)
        if kept[place - 1] != digests[place - 1]
    ]
    if len(commands) * WORTHWHILE_SHARE > len(wanted):
        return None
    return Patch(tuple(commands), len(held), rules)


def _common(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Return with how many equal values both begin."""
    return next((place for place in range(most) if one[place] != other[place]), most)
