"""Comments of nft objects, truncated to the length that nft accepts. Pure."""

from __future__ import annotations

MAX_COMMENT_LENGTH = 128
"""Maximum number of characters that nft accepts in a comment (NFTNL_UDATA_COMMENT_MAXLEN).

The name of a service port can be longer: up to 63 + 63 + 15 characters and two separators.
"""
_ELLIPSIS = "..."


def comment_of(text: str) -> str:
    """Return the text as a comment. If it is longer than nft accepts, truncate it and end it with `...`."""
    return text if len(text) <= MAX_COMMENT_LENGTH else text[: MAX_COMMENT_LENGTH - len(_ELLIPSIS)] + _ELLIPSIS
