"""Recognize events that change nothing that kproxy uses, such as a changed annotation. Pure."""

from __future__ import annotations

MAX_CONTENTS = 4096
"""Maximum number of objects whose last content is remembered. They take about 0.7 MB."""


class Contents:
    """The last contents of the objects of one watch: the encoded parts of them that kproxy uses.

    Only their hashes are remembered. These have 64 bits, and the hashes of all strings in them have a random key
    (SipHash, unless `PYTHONHASHSEED` is set), so that two contents with the same hash cannot be prepared.
    """

    def __init__(self) -> None:
        self._hashes: dict[int, int] = {}

    def is_unchanged(self, namespace: str, name: str, *content: object) -> bool:
        """Return whether an object has the same content as the last time. If not, remember it.

        All parts of the content must be hashable. Call `forget` if it cannot be decoded.
        """
        key, value = hash((namespace, name)), hash((namespace, name, *content))
        if self._hashes.get(key) == value:
            return True
        if len(self._hashes) >= MAX_CONTENTS:
            self._hashes.clear()
        self._hashes[key] = value
        return False

    def forget(self, namespace: str, name: str) -> None:
        """Forget the content of an object, because it was deleted, cannot be decoded, or was read otherwise."""
        if self._hashes:
            self._hashes.pop(hash((namespace, name)), None)
