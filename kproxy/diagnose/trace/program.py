"""Rules as a program for one packet: base chains, chains, rules, and what a statement can do. Pure.

Both iptables and nftables rules become this program. A rule is a list of checks and actions. A check says whether it
matches, or that this cannot be known; an action says all ways in which the packet can continue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from msgspec import Struct, field

from kproxy.diagnose.trace.flow import Flow, TraceFacts, Truth

Hook: TypeAlias = Literal["ingress", "prerouting", "input", "forward", "output", "postrouting"]
ChainKey: TypeAlias = tuple[str, str, str]
"""The program and family (such as `iptables ip` or `ip`), the table, and the chain."""


class RuleSource(Struct, frozen=True):
    """Where a rule is: `family` is nft's name of the family, or the name of an iptables variant."""

    family: str
    table: str
    chain: str
    text: str = ""
    comment: str = ""
    handle: int = 0
    number: int = 0


class Decision(Struct, frozen=True):
    """A verdict. `unknown` means that something else decides, such as a program behind NFQUEUE."""

    action: Literal["accept", "drop", "reject", "return", "continue", "jump", "goto", "unknown"]
    chain: str = ""
    detail: str = ""


class Way(Struct, frozen=True):
    """One way in which a packet can continue after an action.

    Without a `decision`, it continues with the next statement of the rule, or with the next rule if it has not
    `matched`. `probability` is None if it is not known whether it takes this way. `note` is text for people, such as
    the comment of a map's element.
    """

    flow: Flow
    decision: Decision | None = None
    matched: bool = True
    probability: float | None = 1.0
    note: str = ""


class Check(Struct, frozen=True):
    """A condition on the packet. `text` is the condition as people write it.

    `assume` returns the packet under the assumption that an unknown condition is true or false.
    """

    test: Callable[[Flow, TraceFacts], Truth]
    text: str = ""
    assume: Callable[[Flow, bool], Flow] = lambda flow, _: flow


class Action(Struct, frozen=True):
    """A statement that changes the packet or decides about it. It returns at least one way.

    `reason` says why the way is unknown, if it is. `changes` is false if the packet itself always stays the same.
    """

    run: Callable[[Flow, TraceFacts], tuple[Way, ...]]
    reason: str = ""
    changes: bool = True


class Rule(Struct, frozen=True):
    """A rule: its statements in order."""

    source: RuleSource
    statements: tuple[Check | Action, ...]


class Base(Struct, frozen=True):
    """A base chain: its type, hook, priority, policy, and the device of an ingress chain."""

    key: ChainKey
    kind: Literal["filter", "nat"]
    hook: Hook
    priority: int
    drops: bool = False
    device: str = ""


class Program(Struct):
    """All chains of all tables of a node.

    `endpoints` are the targets of all DNAT rules ("ip:port"). `notes` are lines about what is not evaluated.
    """

    chains: dict[ChainKey, list[Rule]] = field(default_factory=dict)
    bases: list[Base] = field(default_factory=list)
    endpoints: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Program) -> None:
        """Add the chains of another dump."""
        self.chains.update(other.chains)
        known = {base.key for base in self.bases}
        self.bases.extend(base for base in other.bases if base.key not in known)
        self.endpoints |= other.endpoints
        self.notes.extend(note for note in other.notes if note not in self.notes)


def decide(action: Decision) -> Action:
    """Return the action that always decides this."""
    return Action(lambda flow, _: (Way(flow, action),), changes=False)


def change(change_flow: Callable[[Flow], Flow]) -> Action:
    """Return the action that changes the packet and continues."""
    return Action(lambda flow, _: (Way(change_flow(flow)),))


def unknown_action(reason: str) -> Action:
    """Return an action that nobody can predict: the packet continues, or it does not."""
    return Action(
        lambda flow, _: (
            Way(flow, matched=False, probability=None),
            Way(flow, Decision("unknown", detail=reason), probability=None),
        ),
        reason,
        changes=False,
    )


def always(_: Flow, __: TraceFacts) -> Truth:
    """Return True: a condition that every packet meets."""
    return True


def never_known(_: Flow, __: TraceFacts) -> Truth:
    """Return None: a condition that cannot be evaluated."""
    return None


def negate(truth: Truth) -> Truth:
    """Return the opposite of a condition."""
    return None if truth is None else not truth
