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

    If `limit` is not 0, cut the result to about this number of characters, and say how many are missing.
    """
    if limit and len(text) > limit:
        return f"{printable(text[:limit])}... ({len(text) - limit:,} more characters)"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
