"""Comments of nft objects, truncated to the length that nft accepts. Pure."""

from __future__ import annotations

MAX_COMMENT_LENGTH = 128
"""Maximum length of a comment in nft (NFTNL_UDATA_COMMENT_MAXLEN).

The name of a service port can be longer (63 + 63 + 15 characters).
"""
_ELLIPSIS = "..."


def comment_of(text: str) -> str:
    """Return the text, truncated with `...` to the length that nft accepts for a comment."""
    return text if len(text) <= MAX_COMMENT_LENGTH else text[: MAX_COMMENT_LENGTH - len(_ELLIPSIS)] + _ELLIPSIS
