"""Text of unknown origin, made safe for a log, an event or a terminal. Pure.

Names and values from objects, files, API servers, processes and programs can contain any character. Printed unchanged,
a line break could forge a log line, an escape sequence could control the terminal, and a bidirectional control
character could reverse the meaning of a line.
"""

from __future__ import annotations

MAX_LENGTH = 4096
"""Maximum number of characters of one log message or of one line of output."""


def printable(text: str, limit: int = 0) -> str:
    """Escape control characters, line separators and other non-printable characters as Python does.

    If `limit` is not 0, cut the result to at most this number of characters, and then say how many of `text` are
    missing.
    """
    if text.isprintable() and (not limit or len(text) <= limit):
        return text
    if not limit:
        return "".join(map(_escaped, text))
    kept = 0
    parts: list[str] = []
    for character in text[:limit]:
        part = _escaped(character)
        kept += len(part)
        if kept > limit:
            break
        parts.append(part)
    missing = len(text) - len(parts)
    return "".join(parts) + (f"... ({missing:,} more characters)" if missing else "")


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
