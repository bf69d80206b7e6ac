"""The words of one line of `nft list`, read from left to right."""

from __future__ import annotations

import re

from kproxy.simulate.packet import UnknownRuleError

_WORD = re.compile(r'\s*("[^"]*"|[{},;]|[^\s{},;"]+)')


class Words:
    """A line's words, each to be taken once. Raises `UnknownRuleError` for any that is not the one expected.

    Braces, commas and semicolons are words of their own, and so is what stands in quotes.
    """

    def __init__(self, line: str) -> None:
        self._words: list[str] = []
        place, line = 0, line.rstrip()
        while place < len(line):
            found = _WORD.match(line, place)
            if not found:
                raise UnknownRuleError("a quote without its end")
            self._words.append(found[1])
            place = found.end()
        self._place = 0

    def __bool__(self) -> bool:
        """Whether there are words left."""
        return self._place < len(self._words)

    @property
    def open_braces(self) -> int:
        """How many braces the line opens beyond those that it closes."""
        return self._words.count("{") - self._words.count("}")

    def sees(self, *words: str) -> bool:
        """Return whether these are the next words, without taking them."""
        return tuple(self._words[self._place : self._place + len(words)]) == words

    def sees_set(self) -> bool:
        """Return whether the next word is the name of a set or map after its `@`, without taking it."""
        return bool(self) and self._words[self._place].startswith("@")

    def sees_name(self) -> bool:
        """Return whether the next word begins with a letter, without taking it."""
        return bool(self) and self._words[self._place][0].isalpha()

    def take(self, *words: str) -> bool:
        """Take these words if they are the next; return whether they were."""
        found = self.sees(*words)
        self._place += len(words) if found else 0
        return found

    def next(self) -> str:
        """Take the next word, whatever it is."""
        if not self:
            raise UnknownRuleError(f"nothing after {self._words[-1] if self._words else 'the start of the line'}")
        self._place += 1
        return self._words[self._place - 1]

    def expect(self, *words: str) -> None:
        """Take exactly these words."""
        for word in words:
            found = self.next()
            if found != word:
                raise UnknownRuleError(f"{found} is not known here, only {word}")

    def text(self) -> str:
        """Take what stands in quotes; return it without them."""
        found = self.next()
        if not found.startswith('"'):
            raise UnknownRuleError(f"{found} does not stand in quotes")
        return found[1:-1]

    def number(self) -> int:
        """Take a number, decimal or hexadecimal."""
        found = self.next()
        try:
            return int(found, 16 if found.startswith("0x") else 10)
        except ValueError:
            raise UnknownRuleError(f"{found} is not a number") from None

    def with_commas(self) -> list[str]:
        """Take words with commas between them."""
        found = [self.next()]
        while self.take(","):
            found.append(self.next())
        return found

    def end(self) -> None:
        """Check that no word is left."""
        if self:
            raise UnknownRuleError(f"{self.next()} is not known here")
