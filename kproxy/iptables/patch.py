"""Patch a long chain: change single rules instead of rewriting the chain. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

MIN_PATCHABLE_RULES = 4
"""Chains with fewer rules are always rewritten: a patch would not be cheaper."""
RULES_PER_COMMAND = 3
"""Minimum number of rules of the new chain for each command of a patch.

A command costs more than a written rule, because iptables-nft reads the existing rules first. In measurements, a patch
with half as many commands as the chain has rules took as long as rewriting the chain.
"""
READS_PER_WRITE = 8
"""How many rules iptables-nft reads in the time that it needs to write one."""


class ChainPatch(Struct, frozen=True):
    """Commands that change single rules of a chain so that its rules become `rules` (one per line).

    The commands refer to rules by number, so they are valid only while the chain has `old_length` rules. If it has any
    other number of rules, another process has changed the chain, and the whole chain must be rewritten. The same
    applies if the chain does not have `new_length` rules afterwards: another process has changed it at the same time.
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
        """Time to apply the patch, in units of one written rule. It includes reading all existing rules."""
        return len(self.commands) + self.old_length // READS_PER_WRITE


def make_patch(chain: str, existing: Sequence[int], rules: str) -> ChainPatch | None:
    """Return the patch from the `existing` rules (as digests) to `rules`, or None if a rewrite is as cheap.

    Rules are inserted or deleted after the common prefix of both. This preserves the distance of later rules from the
    end of the chain: the probability in a rule that picks an endpoint depends on how many rules follow it.
    """
    desired = rules.split("\n")
    if len(desired) < MIN_PATCHABLE_RULES:
        return None
    digests = [hash(rule) for rule in desired]
    prefix = _common_prefix(existing, digests)
    added = len(digests) - len(existing)
    bodies = [rule.removeprefix(f"-A {chain} ") for rule in desired]
    if added < 0:
        # Each deletion moves the rules after it up by one.
        commands = [f"-D {chain} {prefix + 1}"] * -added
        remaining = [*existing[:prefix], *existing[prefix - added :]]
    else:
        # Insert all rules before the same existing rule, whose number grows with each insertion. Within a transaction,
        # the kernel accepts only rules from before the transaction as positions, so insertions precede replacements.
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
