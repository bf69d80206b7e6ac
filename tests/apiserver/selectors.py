"""Label and field selectors, parsed as the API server does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Labels = dict[str, str]


class SelectorError(ValueError):
    """A selector that the server rejects with status 400."""


@dataclass(frozen=True)
class Stored:
    """A stored object: its JSON without kind and apiVersion, and the labels and fields that selectors match."""

    key: str
    namespace: str
    version: int
    raw: bytes
    labels: Labels
    fields: dict[str, str]


Selector = Callable[[Stored], bool]


def label_test(selector: str) -> Selector:
    tests = [_label_term(term.strip()) for term in _split(selector)]
    return lambda item: all(test(item.labels) for test in tests)


def _split(selector: str) -> list[str]:
    return [term for term in re.split(r",(?![^()]*\))", selector) if term.strip()]


def _label_term(term: str) -> Callable[[Labels], bool]:
    if term.startswith("!"):
        return lambda labels: term[1:] not in labels
    if found := re.fullmatch(r"(\S+)\s+(in|notin)\s+\(([^()]*)\)", term):
        key, verb, values = found[1], found[2], {value.strip() for value in found[3].split(",")}
        if verb == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    key, operator, value = re.match(r"([^!=]*)(==|=|!=|)(.*)", term).groups()  # type: ignore[union-attr]
    if operator == "!=":
        return lambda labels: labels.get(key) != value
    if operator:
        return lambda labels: labels.get(key) == value
    return lambda labels: key in labels


def field_test(selector: str, selectable: tuple[str, ...]) -> Selector:
    allowed = {"metadata.name", "metadata.namespace", *selectable}
    terms = []
    for term in _split(selector):
        key, operator, value = re.match(r"([^!=]*)(==|=|!=|)(.*)", term.strip()).groups()  # type: ignore[union-attr]
        if key not in allowed:
            raise SelectorError(f"field label not supported: {key}")
        terms.append((key, operator == "!=", value))
    return lambda item: all((item.fields.get(key, "") == value) is not unequal for key, unequal, value in terms)
