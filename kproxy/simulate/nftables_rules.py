"""The grammar of one rule as `nft list` prints it. Any word that is not known here is an `UnknownRuleError`.

A rule's statements are carried out from left to right. So one that changes a packet has done so even if a later one
finds that the rule does not match.
"""

from __future__ import annotations

from msgspec import Struct, field
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.flock import Flock
from kproxy.simulate.nftables_fields import TABLES, Fields, read_fields, sees_field
from kproxy.simulate.nftables_sets import Elements, Values
from kproxy.simulate.nftables_statements import Change, Choice, Match, Statement, always, read_plain
from kproxy.simulate.nftables_verdicts import Decision, read_destination
from kproxy.simulate.nftables_words import Words
from kproxy.simulate.packet import UnknownRuleError
from kproxy.simulate.passage import Passage

_ROUNDING = 1e-12
"""What is left of 1 after all of its parts are taken away counts as nothing below this."""


class Rule(Struct, frozen=True):
    """A rule: what is asked and done first, and what is decided in the end, if anything."""

    steps: tuple[Match | Change, ...]
    choice: Choice | None = None

    def hit(self, flock: Flock) -> tuple[list[tuple[Decision, Flock]], Flock]:
        """Return those about whom the rule decides, by decision, and those who go on with the next rule."""
        onward: Flock = []
        for step in self.steps:
            flock, missed = _take(step, flock)
            onward += missed
        if self.choice is None:
            return [], onward + flock
        decided: dict[Decision, Flock] = {}
        for passage, share in flock:
            rest = 1.0
            for decision, chance in self.choice.choose(passage):
                decided.setdefault(decision, []).append((passage, share * chance))
                rest -= chance
            if rest > _ROUNDING:
                onward.append((passage, share * rest))
        return list(decided.items()), onward


def _take(step: Match | Change, flock: Flock) -> tuple[Flock, Flock]:
    """Return those who go on within the rule, and those whom it does not match."""
    if isinstance(step, Change):
        return [(step.change(passage), share) for passage, share in flock], []
    chances = [(passage, share, step.share(passage)) for passage, share in flock]
    matching = [(passage, share * chance) for passage, share, chance in chances if chance]
    return matching, [(passage, share * (1.0 - chance)) for passage, share, chance in chances if chance < 1.0]


class Scope(Struct):
    """What the rules of a table share: its sets and maps, and which endpoints an affinity set leads to.

    `updated` and `endpoints` are those of the chain that is being read.
    """

    family: Family
    sets: dict[str, Elements]
    served: dict[str, set[str]] = field(default_factory=dict)
    updated: set[str] = field(default_factory=set)
    endpoints: set[str] = field(default_factory=set)

    def end_chain(self) -> None:
        """Keep in mind that whom the chain adds to a set, it sends to its endpoint."""
        for name in self.updated:
            self.served_by(name).update(self.endpoints)
        self.updated.clear()
        self.endpoints.clear()

    def served_by(self, name: str) -> set[str]:
        """Return the endpoints of the clients that a set remembers, which may still become more."""
        return self.served.setdefault(name, set())

    def named(self, words: Words) -> tuple[str, Elements]:
        """Take the name of a set or map; return it with what it holds."""
        name = words.next().removeprefix("@")
        if name not in self.sets:
            raise UnknownRuleError(f"there is no set or map {name}")
        return name, self.sets[name]

    def elements(self, words: Words, fields: Fields, values: Values) -> Elements:
        """Take a set or map, by name or as it stands in the rule, that leads from a key to such values."""
        if words.sees_set():
            _, found = self.named(words)
        else:
            found = Elements(self.family, fields.kinds, values)
            found.read_elements(words)
        found.check(fields, values)
        return found


def read_rule(words: Words, scope: Scope) -> Rule:
    """Return the rule of a line."""
    steps: list[Match | Change] = []
    choice = None
    while words and not words.sees("comment") and not choice:
        statement = read_plain(words, scope.family) or _read_referring(words, scope)
        if isinstance(statement, Choice):
            choice = statement
        else:
            steps.append(statement)
    if words.take("comment"):
        words.text()
    words.end()
    return Rule(tuple(steps), choice)


def _read_referring(words: Words, scope: Scope) -> Statement:
    """Take a statement that needs a key, or what else is in the table."""
    if words.take("update"):
        return _read_update(words, scope)
    if words.take("dnat"):
        return _read_dnat(words, scope)
    fields = read_fields(words, scope.family)
    if words.take("vmap"):
        verdicts = scope.elements(words, fields, "verdict")
        return Choice(lambda passage: verdicts.choices(fields, passage), verdicts.chains)
    return _read_draw(words, fields) if fields.modulus else _read_comparison(words, scope, fields)


def _read_update(words: Words, scope: Scope) -> Change:
    """Take the statement that remembers the source, for as long as the set says."""
    name, found = scope.named(words)
    words.expect("{")
    fields = read_fields(words, scope.family)
    words.expect("}")
    if not fields.is_source:
        raise UnknownRuleError("update is known for the packet's source only")
    found.check(fields, "nothing")
    scope.updated.add(name)
    return Change(lambda passage: replace(passage, remembered=True))


def _read_dnat(words: Words, scope: Scope) -> Choice:
    words.take(TABLES[scope.family])
    words.expect("to")
    if not sees_field(words, scope.family):
        endpoint = read_destination(words, scope.family)
        scope.endpoints.add(endpoint.socket)
        return always(endpoint.decision())
    fields = read_fields(words, scope.family)
    words.expect("map")
    found = scope.elements(words, fields, "endpoint")
    return Choice(lambda passage: found.choices(fields, passage))


def _read_draw(words: Words, fields: Fields) -> Match:
    if len(fields.parts) > 1:
        raise UnknownRuleError("a key with a number is known in maps only")
    chance = 1.0 / fields.modulus if words.number() < fields.modulus else 0.0
    return Match(lambda _: chance)


def _read_comparison(words: Words, scope: Scope, fields: Fields) -> Match:
    negated = words.take("!=")
    if words.sees_set():
        return _read_lookup(words, scope, fields, negated=negated)
    if words.sees("{"):
        found = scope.elements(words, fields, "nothing")
    else:
        found = Elements(scope.family, fields.kinds, "nothing")
        found.read_element(words)
    return Match(lambda passage: found.holds(fields.key(passage)) is not negated)


def _read_lookup(words: Words, scope: Scope, fields: Fields, *, negated: bool) -> Match:
    """Take the name of a set. A source that was sent to an endpoint before is in the set that leads to it."""
    name, found = scope.named(words)
    found.check(fields, "nothing")
    served = scope.served_by(name)

    def holds(passage: Passage) -> bool:
        remembered = fields.is_source and not passage.packet.remembered.isdisjoint(served)
        return remembered or found.holds(fields.key(passage))

    return Match(lambda passage: holds(passage) is not negated)
