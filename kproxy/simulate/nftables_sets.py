"""Parse nftables sets and maps, named and anonymous, and look up elements in them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, TypeAlias

from msgspec import Struct, field

from kproxy.model.types import Family
from kproxy.simulate.nftables_statements import (
    KeyExpression,
    KeyType,
    ListedVerdict,
    TokenReader,
    make_dnat_target,
    parse_address,
    parse_address_range,
    parse_key,
    parse_key_types,
    parse_value,
    parse_verdict,
)
from kproxy.simulate.packet import PacketState, UnknownRuleError

_FLAGS = {"dynamic", "timeout", "interval"}

SetKind: TypeAlias = Literal["set", "verdict map", "endpoint map"]
"""What the elements contain in addition to the key.

In a set, an element contains only the key. In a verdict map, it also contains a verdict. In an endpoint map, it also
contains an address and a port for `dnat`.
"""


class ListedSet(Struct):
    """A set or map and its elements.

    One part of the key may be a number, which is compared with a random number (numgen). `elements` maps the other
    parts of the key to a second mapping, from this number to the verdict. The number is 0 if the key contains none. The
    verdict is None in a set, and DNAT to the endpoint in an endpoint map.

    A set of addresses may also have `ranges`, given as pairs of the first and the last address. The methods that parse
    raise `UnknownRuleError` for unsupported text.
    """

    family: Family
    key_types: tuple[KeyType, ...]
    kind: SetKind
    elements: dict[tuple[Hashable, ...], dict[int, ListedVerdict | None]] = field(default_factory=dict)
    ranges: list[tuple[int, int]] = field(default_factory=list)

    @property
    def chains(self) -> frozenset[str]:
        """The target chains of all `goto` and `jump` verdicts in the map."""
        verdicts = (verdict for numbers in self.elements.values() for verdict in numbers.values())
        return frozenset(verdict.chain for verdict in verdicts if verdict and verdict.chain)

    def contains(self, key: tuple[Hashable, ...]) -> bool:
        """Return whether the set contains a key, either as an element or as an address in one of the ranges."""
        if key in self.elements:
            return True
        (address, *_) = key
        return isinstance(address, int) and any(first <= address <= last for first, last in self.ranges)

    def lookup(self, key: KeyExpression, state: PacketState) -> list[tuple[ListedVerdict, float]]:
        """Return the possible verdicts for a packet, each with its probability.

        The probabilities sum to less than 1 if the map has no element for the key, or for some of the random numbers.
        """
        found = self.elements.get(key.evaluate(state), {})
        probability, bound = (1.0 / key.modulus, key.modulus) if key.modulus else (1.0, 1)
        return [(verdict, probability) for number, verdict in found.items() if verdict and number < bound]

    def check(self, key: KeyExpression, kind: SetKind) -> None:
        """Raise `UnknownRuleError` unless this is a set or map of the given kind with the type of `key`."""
        if self.kind != kind:
            raise UnknownRuleError(f"expected {kind}, got {self.kind}")
        if self.key_types != key.types:
            raise UnknownRuleError(f"key type {' . '.join(key.types)} does not match {' . '.join(self.key_types)}")

    def parse_elements(self, tokens: TokenReader) -> None:
        """Parse a list of elements in braces."""
        tokens.expect("{")
        while not tokens.accept("}"):
            self.parse_element(tokens)
            if not tokens.at("}"):
                tokens.expect(",")

    def parse_element(self, tokens: TokenReader) -> None:
        """Parse one element: key, expiration, comment and value."""
        if self.kind == "set" and self.key_types == ("address",):
            first, last = parse_address_range(tokens, self.family)
            if first != last:
                self.ranges.append((first, last))
                _skip_element_options(tokens)
                return
            key: tuple[Hashable, ...] = (first,)
            number = 0
        else:
            key, number = self._parse_key(tokens)
        _skip_element_options(tokens)
        numbers = self.elements.setdefault(key, {})
        if number in numbers:
            raise UnknownRuleError("duplicate element")
        numbers[number] = self._parse_value(tokens)

    def _parse_key(self, tokens: TokenReader) -> tuple[tuple[Hashable, ...], int]:
        """Parse the key of an element.

        Return a pair: the values of all parts other than the number, and the number itself (0 if the key has none).
        """
        key: list[Hashable] = []
        number = 0
        for index, key_type in enumerate(self.key_types):
            if index:
                tokens.expect(".")
            if key_type == "number":
                number = tokens.number()
            else:
                key.append(parse_value(tokens, key_type, self.family))
        return tuple(key), number

    def _parse_value(self, tokens: TokenReader) -> ListedVerdict | None:
        if self.kind == "set":
            return None
        tokens.expect(":")
        if self.kind == "verdict map":
            verdict = parse_verdict(tokens)
            if verdict is None:
                raise UnknownRuleError(f"unexpected {tokens.next()}, expected a verdict")
            return verdict
        address = parse_address(tokens, self.family)
        tokens.expect(".")
        return make_dnat_target(address, tokens.number(), self.family).verdict()


def parse_set_property(
    tokens: TokenReader, found: ListedSet | None, family: Family, *, is_map: bool
) -> ListedSet | None:
    """Parse one line of a set or map.

    `found` is the result for the previous lines. It is None until the line with the type has been parsed. Return the
    updated result. Raises `UnknownRuleError` for unsupported text.
    """
    name = tokens.next()
    if name in ("type", "typeof") and found is None:
        key_types = parse_key_types(tokens, family) if name == "type" else parse_key(tokens, family).types
        found = ListedSet(family, key_types, _parse_map_kind(tokens, family) if is_map else "set")
    elif name == "elements" and found:
        tokens.expect("=")
        found.parse_elements(tokens)
    else:
        _skip_set_property(name, tokens)
    tokens.expect_end()
    return found


def _parse_map_kind(tokens: TokenReader, family: Family) -> SetKind:
    tokens.expect(":")
    if tokens.accept("verdict"):
        return "verdict map"
    if parse_key(tokens, family).types != ("address", "port"):
        raise UnknownRuleError("unsupported map: values must be verdicts, or addresses with ports")
    return "endpoint map"


def _skip_element_options(tokens: TokenReader) -> None:
    """Skip the counter, the timeouts and the comment of an element. nft lists only elements that have not expired."""
    if tokens.at("counter", "packets"):
        tokens.expect("counter")
        for token in ("packets", "bytes"):
            tokens.expect(token)
            tokens.number()
    for token in ("timeout", "expires"):
        if tokens.accept(token):
            tokens.next()
    if tokens.accept("comment"):
        tokens.quoted()


def _skip_set_property(name: str, tokens: TokenReader) -> None:
    """Skip a property that has no effect on lookups."""
    match name:
        case "comment":
            tokens.quoted()
        case "counter":
            pass
        case "size":
            tokens.number()
        case "timeout":
            tokens.next()
        case "flags":
            unknown = set(tokens.comma_separated()) - _FLAGS
            if unknown:
                raise UnknownRuleError(f"unsupported flags {', '.join(sorted(unknown))}")
        case _:
            raise UnknownRuleError(f"unsupported property {name}")
