"""Patch a long chain: change individual rules instead of rewriting the chain. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

MIN_PATCHABLE_RULES = 4
"""Minimum length, in rules, of a chain that is patched. For a shorter chain, a patch is no cheaper than a rewrite."""
RULES_PER_COMMAND = 3
"""Limit on the commands of a patch: the new chain must have at least this many rules for each command.

Running a command takes longer than writing a rule, because iptables-nft first reads the existing rules. In
measurements, a patch with one command for every two rules of the chain took as long as rewriting the chain.
"""
READS_PER_WRITE = 8
"""Number of rules that iptables-nft reads in the time that it needs to write one rule."""


class ChainPatch(Struct, frozen=True):
    """Commands that change individual rules of a chain. Afterwards the chain consists of `rules` (one per line).

    The commands refer to rules by number, so they are valid only while the chain has `old_length` rules. If the chain
    has any other number of rules, another process has changed it. The whole chain must then be rewritten. It must also
    be rewritten if it does not have `new_length` rules after the patch: in this case, another process changed the chain
    at the same time.
    """

    commands: tuple[str, ...]
    old_length: int
    rules: str

    @property
    def new_length(self) -> int:
        """Number of rules in the chain after the patch."""
        return self.rules.count("\n") + 1

    @property
    def cost(self) -> int:
        """Time to apply the patch, in units of the time to write one rule. Includes reading all existing rules."""
        return len(self.commands) + self.old_length // READS_PER_WRITE


def make_patch(chain: str, existing: Sequence[int], rules: str) -> ChainPatch | None:
    """Return the patch from the `existing` rules (given as digests) to `rules`, or None if a rewrite is as cheap.

    Rules are inserted or deleted right after the common prefix of the existing and the new rules. Later rules therefore
    keep their distance from the end of the chain, and many of them can remain unchanged: if a rule picks an endpoint
    with a certain probability, this probability depends only on the number of rules that follow it.
    """
    desired = rules.split("\n")
    if len(desired) < MIN_PATCHABLE_RULES:
        return None
    digests = [hash(rule) for rule in desired]
    prefix = _common_prefix(existing, digests)
    added = len(digests) - len(existing)
    bodies = [rule.removeprefix(f"-A {chain} ") for rule in desired]
    if added < 0:
        # After each deletion, the next rule to delete has the same number.
        commands = [f"-D {chain} {prefix + 1}"] * -added
        remaining = [*existing[:prefix], *existing[prefix - added :]]
    else:
        # Insert all rules before the same existing rule, whose number grows with each insertion. The kernel accepts a
        # rule as the position of an insertion only if the rule existed before the transaction. Insertions therefore
        # precede replacements, which create new rules.
        commands = [f"-I {chain} {index + 1} {bodies[index]}" for index in range(prefix, prefix + added)]
        remaining = [*digests[: prefix + added], *existing[prefix:]]
    commands += [
        f"-R {chain} {index + 1} {bodies[index]}"
        for index, (old, new) in enumerate(zip(remaining, digests, strict=True))
        if old != new
    ]
    if len(commands) * RULES_PER_COMMAND > len(desired):
        return None
    return ChainPatch(tuple(commands), len(existing), rules)


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))
