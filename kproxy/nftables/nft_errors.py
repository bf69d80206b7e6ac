"""Find the objects that `nft -f` complains about, by the lines and columns of its error messages."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from os import strerror

from kproxy.nftables.elements import SetElement
from kproxy.nftables.nft_syntax import NftWriter
from kproxy.nftables.rejection import RejectedObject
from kproxy.nftables.transaction import Transaction

_ERROR = re.compile(r":(\d+):(\d+)-\d+: Error: (.*)")
"""The line, the first column and the message of an error. Both numbers start at 1."""


class NftErrors:
    """Maps the errors of `nft -f` to the objects of the transaction that it was given."""

    def __init__(self, writer: NftWriter, transaction: Transaction) -> None:
        self._writer = writer
        self._transaction = transaction

    def objects(self, errors: str) -> tuple[RejectedObject, ...]:
        """Return the objects that the error output names, or nothing if it does not name any."""
        commands = self._writer.commands(self._transaction).splitlines()
        found = []
        for line, column, message in _ERROR.findall(errors):
            if 0 < int(line) <= len(commands):
                found.append(self._object(commands[int(line) - 1], int(column) - 1, message))
        return tuple(found)

    def _object(self, command: str, column: int, message: str) -> RejectedObject:
        words = command.split(" ", 5)
        verb, kind, _, table, *rest = words
        code = error_code(message)
        if kind == "table" or column < len(" ".join(words[:4])):
            return RejectedObject("table", table, f"table {table}: {message}", code=code)
        name = rest[0]
        if kind in {"chain", "rule"}:
            subject = "chain" if kind == "chain" else "a rule of chain"
            return RejectedObject("chain", name, f"{subject} {name}: {message}", code=code)
        begin = command.index("{") + len("{ ") if kind == "element" else len(command)
        element = self._element(name, column - begin, deleted=verb == "delete") if column >= begin else None
        if element is None:
            return RejectedObject("set", name, f"set {name}: {message}", code=code)
        service_port = f" of {element.comment}" if element.comment else ""
        reason = f"element {self._writer.key(name, element.key)} of {name}{service_port}: {message}"
        return RejectedObject("element", name, reason, element.key, code)

    def _element(self, set_name: str, column: int, *, deleted: bool) -> SetElement | None:
        """Return the element at a column of the list of elements."""
        end = 0
        for element, text in self._elements(set_name, deleted=deleted):
            end += len(text) + len(", ")
            if column < end:
                return element
        return None

    def _elements(self, set_name: str, *, deleted: bool) -> Iterator[tuple[SetElement, str]]:
        if deleted:
            for element in self._transaction.deleted_elements[set_name]:
                yield element, self._writer.key(set_name, element.key)
        else:
            for element in self._transaction.all_added_elements()[set_name]:
                yield element, self._writer.added_element(set_name, element)


def error_code(message: str) -> int:
    """Return the errno that nft's message is about, or 0 if it is unknown."""
    return next((code for code in errno.errorcode if strerror(code) in message), 0)
