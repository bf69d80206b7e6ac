"""The statements of a rule that refer to nothing else in their table (nft(8))."""

from __future__ import annotations

from collections.abc import Callable
from operator import and_, or_, xor
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.nftables_verdicts import MASQUERADE, Decision, read_verdict, reject
from kproxy.simulate.nftables_words import Words
from kproxy.simulate.packet import UnknownRuleError
from kproxy.simulate.passage import Passage

_STATES = {"new": "NEW", "established": "ESTABLISHED", "related": "RELATED", "invalid": "INVALID"}
_BITS: dict[str, Callable[[int, int], int]] = {"|": or_, "^": xor, "&": and_}


class Match(Struct, frozen=True):
    """A condition: for what part of packets like this one it holds. That is all or none, but for drawn numbers."""

    share: Callable[[Passage], float]


class Change(Struct, frozen=True):
    """A statement that changes a packet and lets it go on within the rule."""

    change: Callable[[Passage], Passage]


class Choice(Struct, frozen=True):
    """The end of a rule: what may be decided, with the chance of each. For the rest, the rule does not match.

    `chains` are all that it may send packets to.
    """

    choose: Callable[[Passage], list[tuple[Decision, float]]]
    chains: frozenset[str] = frozenset()


Statement: TypeAlias = Match | Change | Choice


def always(decision: Decision) -> Choice:
    """Return the choice that leaves none."""
    chains = frozenset({decision.chain} if decision.chain else ())
    return Choice(lambda _: [(decision, 1.0)], chains)


def read_plain(words: Words, family: Family) -> Statement | None:
    """Take one statement; None if the next begins with a key, or refers to a set or map."""
    decision = read_verdict(words)
    if decision:
        return always(decision)
    if words.take("reject"):
        return always(reject(family))
    found = next((reader for start, reader in _READERS.items() if words.take(*start)), None)
    return found(words) if found else None


def _read_masquerade(words: Words) -> Choice:
    words.take("fully-random")
    return always(MASQUERADE)


def _read_status(words: Words) -> Match:
    words.expect("dnat")
    return Match(lambda passage: bool(passage.target))


def _read_states(words: Words) -> Match:
    names = words.with_commas()
    unknown = set(names) - _STATES.keys()
    if unknown:
        raise UnknownRuleError(f"connection state {', '.join(sorted(unknown))} is not known")
    states = {_STATES[name] for name in names}
    return Match(lambda passage: passage.packet.state in states)


def _read_fib(words: Words) -> Match:
    of_source = words.take("saddr")
    if not of_source:
        words.expect("daddr")
    words.expect("type", "local")
    if of_source:
        return Match(lambda passage: passage.is_local(passage.source))
    return Match(lambda passage: passage.is_local(passage.destination))


def _read_interface(words: Words) -> Match:
    """Match the name, or with a `*` at its end what it begins with. A packet that came in by none has the name ""."""
    negated = words.take("!=")
    name = words.text()
    if name.endswith("*"):
        prefix = name.removesuffix("*")
        return Match(lambda passage: passage.interface.startswith(prefix) is not negated)
    return Match(lambda passage: (passage.interface == name) is not negated)


def _read_mark(words: Words) -> Match | Change:
    if words.take("set", "meta", "mark"):
        operator = words.next()
        if operator not in _BITS:
            raise UnknownRuleError(f"{operator} is not known here, only {', '.join(_BITS)}")
        combine, operand = _BITS[operator], words.number()
        return Change(lambda passage: replace(passage, mark=combine(passage.mark, operand)))
    words.expect("&")
    mask = words.number()
    negated = words.take("!=")
    if not negated:
        words.expect("==")
    wanted = words.number()
    return Match(lambda passage: (passage.mark & mask == wanted) is not negated)


_READERS: dict[tuple[str, ...], Callable[[Words], Statement]] = {
    ("masquerade",): _read_masquerade,
    ("ct", "state"): _read_states,
    ("ct", "status"): _read_status,
    ("fib",): _read_fib,
    ("iifname",): _read_interface,
    ("meta", "mark"): _read_mark,
}
"""By how a statement begins, who takes the rest of it."""
