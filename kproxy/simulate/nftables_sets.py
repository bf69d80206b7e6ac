"""Sets and maps, with a name or within a rule: what they hold, and how a key finds it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, TypeAlias

from msgspec import Struct, field

from kproxy.model.types import Family
from kproxy.simulate.nftables_statements import (
    Kind,
    ListedVerdict,
    PacketFields,
    WordReader,
    endpoint,
    read_address,
    read_fields,
    read_range,
    read_types,
    read_value,
    read_verdict,
)
from kproxy.simulate.packet import PacketState, UnknownRuleError

Values: TypeAlias = Literal["nothing", "verdict", "endpoint"]
"""What a key leads to: nothing in a set, a verdict in a verdict map, an address with a port in a map for `dnat`."""
_FLAGS = {"dynamic", "timeout", "interval"}


class ListedSet(Struct):
    """The elements of a set or map.

    `found` has for each key, but for its number, the decisions by number (0 if the key has none). Where the key is
    one address, there may be `ranges` too, by their first and last address.
    """

    family: Family
    kinds: tuple[Kind, ...]
    values: Values
    found: dict[tuple[Hashable, ...], dict[int, ListedVerdict | None]] = field(default_factory=dict)
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def holds(self, key: tuple[Hashable, ...]) -> bool:
        """Return whether a key is an element, or an address within one."""
        if key in self.found:
            return True
        (address, *_) = key
        return isinstance(address, int) and any(first <= address <= last for first, last in self.ranges)

    def choices(self, fields: PacketFields, passage: PacketState) -> list[tuple[ListedVerdict, float]]:
        """Return what the map may decide about a packet, with the chance of each; the rest finds no element."""
        found = self.found.get(fields.key(passage), {})
        share, below = (1.0 / fields.modulus, fields.modulus) if fields.modulus else (1.0, 1)
        return [(decision, share) for number, decision in found.items() if decision and number < below]

    def check(self, fields: PacketFields, values: Values) -> None:
        """Check that a rule can look up such a key here, and for such values."""
        if self.values != values:
            raise UnknownRuleError(f"what leads to {self.values} has no place here, only what leads to {values}")
        if self.kinds != fields.kinds:
            raise UnknownRuleError(f"a key of {', '.join(fields.kinds)} is none of {', '.join(self.kinds)}")

    def read_elements(self, words: WordReader) -> None:
        """Take elements between their braces."""
        words.expect("{")
        while not words.take("}"):
            self.read_element(words)
            if not words.sees("}"):
                words.expect(",")

    def read_element(self, words: WordReader) -> None:
        """Take one element: its key, when it expires, its comment, and what it leads to."""
        if self.values == "nothing" and self.kinds == ("address",):
            first, last = read_range(words, self.family)
            if first != last:
                self.ranges.append((first, last))
                _read_attributes(words)
                return
            key: tuple[Hashable, ...] = (first,)
            number = 0
        else:
            key, number = self._read_key(words)
        _read_attributes(words)
        numbers = self.found.setdefault(key, {})
        if number in numbers:
            raise UnknownRuleError("an element stands twice")
        numbers[number] = self._read_value(words)

    def _read_key(self, words: WordReader) -> tuple[tuple[Hashable, ...], int]:
        key: list[Hashable] = []
        number = 0
        for place, kind in enumerate(self.kinds):
            if place:
                words.expect(".")
            if kind == "number":
                number = words.number()
            else:
                key.append(read_value(words, kind, self.family))
        return tuple(key), number

    def _read_value(self, words: WordReader) -> ListedVerdict | None:
        if self.values == "nothing":
            return None
        words.expect(":")
        if self.values == "verdict":
            decision = read_verdict(words)
            if decision is None:
                raise UnknownRuleError(f"{words.next()} is not a verdict")
            return decision
        address = read_address(words, self.family)
        words.expect(".")
        return endpoint(address, words.number(), self.family).decision()

    @property
    def chains(self) -> frozenset[str]:
        """All chains that it may send packets to."""
        decisions = (decision for numbers in self.found.values() for decision in numbers.values())
        return frozenset(decision.chain for decision in decisions if decision and decision.chain)


def _read_attributes(words: WordReader) -> None:
    """Take what an element has beside its key. One that has not expired yet counts like any other."""
    for word in ("timeout", "expires"):
        if words.take(word):
            words.next()
    if words.take("comment"):
        words.text()


def read_property(words: WordReader, found: ListedSet | None, family: Family, *, is_map: bool) -> ListedSet | None:
    """Take one line of a set or map, whose type stands before its elements; return it as far as it is known."""
    word = words.next()
    if word in ("type", "typeof") and found is None:
        kinds = read_types(words, family) if word == "type" else read_fields(words, family).kinds
        found = ListedSet(family, kinds, _read_values(words, family) if is_map else "nothing")
    elif word == "elements" and found:
        words.expect("=")
        found.read_elements(words)
    else:
        _read_other(word, words)
    words.end()
    return found


def _read_values(words: WordReader, family: Family) -> Values:
    words.expect(":")
    if words.take("verdict"):
        return "verdict"
    if read_fields(words, family).kinds != ("address", "port"):
        raise UnknownRuleError("maps to anything but verdicts, or addresses with ports, are not known")
    return "endpoint"


def _read_other(word: str, words: WordReader) -> None:
    """Take what does not change which elements there are."""
    match word:
        case "comment":
            words.text()
        case "size":
            words.number()
        case "timeout":
            words.next()
        case "flags":
            unknown = set(words.with_commas()) - _FLAGS
            if unknown:
                raise UnknownRuleError(f"flags {', '.join(sorted(unknown))} are not known")
        case _:
            raise UnknownRuleError(f"{word} is not known here")
