"""Random changes to an input that keep most of its structure."""

from __future__ import annotations

import random
from collections.abc import Sequence

MAX_SIZE = 20_000
"""Maximum size of a mutated input in bytes."""
_NUMBERS = (0, 1, 2, 3, 4, 7, 15, 16, 0x7F, 0x80, 0xFF)
_TOKENS = (
    *(b"0", b"-1", b"1e999", b"99999999999999999999", b"NaN", b"null", b"true", b'"', b"\\", b"\\ud800", b"\xff\xfe"),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b"[[[[[[[[",
        b"{}",
        b":",
        b": ",
        b",",
        b"- ",
        b"*a",
        b"&a ",
        b"<<: ",
        b"!!binary ",
        b"!!x ",
    ),
    *(b"\n", b"\r\n", b"\r\n\r\n", b"\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"k8s\0", b" ", b"#"),
    *(b"COMMIT\n", b"*nat\n", b"-A ", b"[1:2] ", b"\xc2\xb2", b"\xe2\x80\xa8", b"::", b"10.0.0.0/33", b"%", b"<html>"),
)


def mutate(source: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Return an input of the corpus after one to five random changes."""
    data = bytearray(source.choice(corpus))
    for _ in range(source.choice((1, 1, 1, 2, 3, 5))):
        _change(source, data, corpus)
        if len(data) > MAX_SIZE:
            del data[MAX_SIZE:]
    return bytes(data)


def _change(source: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    position = source.randint(0, len(data))
    end = min(len(data), position + source.choice((1, 2, 4, 16, 64, 1024)))
    kind = source.randrange(8)
    if kind == 0 and data:
        data[min(position, len(data) - 1)] ^= 1 << source.randrange(8)
    elif kind == 1 and data:
        data[min(position, len(data) - 1)] = source.choice(_NUMBERS)
    elif kind == 2:
        del data[position:end]
    elif kind == 3:
        data[position:position] = data[position:end] * source.choice((1, 2, 20))
    elif kind == 4:
        data[position:position] = source.choice(_TOKENS)
    elif kind == 5:
        data[position:end] = source.choice(_TOKENS)
    elif kind == 6:
        other = source.choice(corpus)
        start = source.randint(0, len(other))
        data[position:end] = other[start : start + source.choice((1, 4, 16, 64, 1024))]
    else:
        del data[position:]
