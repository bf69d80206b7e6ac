"""The possible fates of a packet: their probabilities, and what cannot be known. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.diagnose.trace.flow import Truth

Verdict: TypeAlias = Literal["accepted", "dropped", "rejected", "unknown"]
_ROUNDING = 1e-9


class Outcome(Struct, frozen=True):
    """The end of one way of a packet.

    `destination` is the address and port to which it is sent, `translated` whether that differs from its original
    destination. `masqueraded` is whether the receiver sees another source, `source` that source if it is known.
    `delivered` is whether the node itself receives the packet. None means unknown.
    """

    verdict: Verdict
    destination: str = ""
    translated: bool = False
    reject_with: str = ""
    masqueraded: Truth = False
    source: str = ""
    delivered: Truth = None
    affinity: bool = False

    @property
    def kind(self) -> tuple[Verdict, str, str]:
        """What distinguishes this outcome from others that are not the same verdict."""
        return (self.verdict, self.destination if self.verdict == "accepted" else "", self.reject_with)


class Result(Struct, frozen=True):
    """All possible outcomes.

    `known` has the outcomes with the probability that they have at least. The rest up to 1 is `unknown`: it can be any
    of the outcomes in `possible`, and that depends on the rules numbered in `causes`.
    """

    known: Mapping[Outcome, float] = field(default_factory=dict)
    possible: frozenset[Outcome] = frozenset()
    causes: frozenset[int] = frozenset()

    @property
    def unknown(self) -> float:
        """The probability of which the outcome is unknown."""
        rest = 1.0 - sum(self.known.values())
        return rest if rest > _ROUNDING else 0.0


def certain(outcome: Outcome) -> Result:
    """Return the result with only one outcome."""
    return Result({outcome: 1.0})


def mixture(parts: Iterable[tuple[float, Result]]) -> Result:
    """Return the result of a random choice."""
    known: dict[Outcome, float] = {}
    possible: set[Outcome] = set()
    causes: set[int] = set()
    for probability, result in parts:
        for outcome, share in result.known.items():
            known[outcome] = known.get(outcome, 0.0) + probability * share
        possible |= result.possible
        causes |= result.causes
    return Result(known, frozenset(possible), frozenset(causes))


def either(ways: list[Result], cause: int) -> Result:
    """Return the result if it is not known which of several ways the packet takes: what they have in common."""
    first = ways[0]
    if all(_equal(first, way) for way in ways[1:]):
        return first
    rests = [dict(way.known) for way in ways]
    known: dict[Outcome, float] = {}
    for outcome in first.known:
        share = min(rest.get(outcome, 0.0) for rest in rests)
        if share > _ROUNDING:
            _take(rests, {outcome}, share)
            known[outcome] = share
    for outcome in list(rests[0]):
        alike = {each for rest in rests for each in rest if each.kind == outcome.kind}
        share = min(sum(rest.get(each, 0.0) for each in alike) for rest in rests)
        if share > _ROUNDING:
            present = [each for each in alike if any(rest.get(each, 0.0) > _ROUNDING for rest in rests)]
            _take(rests, alike, share)
            merged = _merged(present)
            known[merged] = known.get(merged, 0.0) + share
    left = {outcome for rest in rests for outcome, share in rest.items() if share > _ROUNDING}
    possible = frozenset(left).union(*(way.possible for way in ways))
    causes = frozenset[int]().union(*(way.causes for way in ways))
    unsure = 1.0 - sum(known.values()) > _ROUNDING
    return Result(known, possible if unsure else frozenset(), causes | {cause} if unsure else causes)


def _equal(one: Result, other: Result) -> bool:
    if one.known.keys() != other.known.keys() or one.possible != other.possible or one.causes != other.causes:
        return False
    return all(abs(share - other.known[outcome]) < _ROUNDING for outcome, share in one.known.items())


def _take(rests: list[dict[Outcome, float]], outcomes: set[Outcome], share: float) -> None:
    for rest in rests:
        needed = share
        for outcome in outcomes:
            taken = min(needed, rest.get(outcome, 0.0))
            if taken:
                rest[outcome] -= taken
                needed -= taken


def _merged(outcomes: list[Outcome]) -> Outcome:
    """Return one outcome for several of the same kind; properties in which they differ become unknown."""
    first = outcomes[0]
    for other in outcomes[1:]:
        first = replace(
            first,
            masqueraded=first.masqueraded if first.masqueraded == other.masqueraded else None,
            source=first.source if first.source == other.source else "",
            delivered=first.delivered if first.delivered == other.delivered else None,
            affinity=first.affinity or other.affinity,
            translated=first.translated or other.translated,
            destination=first.destination if first.destination == other.destination else "",
        )
    return first
