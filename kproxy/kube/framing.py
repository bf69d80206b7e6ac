"""Where one event of a stream ends and the next begins. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

LONGEST_EVENT = 64 << 20
"""Bytes of one event. etcd takes objects of 1.5 MB unless told otherwise; JSON is no more than a few times that."""

_LENGTH = 4


class FramingError(ValueError):
    """An event that is longer than any can be: probably none at all. What follows it cannot be read either."""


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield each complete line without its end, as soon as it is there; what follows the last is dropped.

    Raises `FramingError`.
    """
    tail: list[bytes] = []  # joined once per line: a line of megabytes comes in thousands of pieces
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        tail.append(first)
        size += len(first)
        if size > LONGEST_EVENT:
            raise FramingError(f"Expected lines of at most {LONGEST_EVENT} bytes")
        if not others:
            continue
        yield b"".join(tail)
        yield from others[:-1]
        tail, size = [others[-1]], len(others[-1])


def split_frames(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what follows each length of 4 bytes, most significant first, as soon as it is complete.

    What follows the last complete frame is dropped. Raises `FramingError`.
    """
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        start = 0
        while len(waiting) >= start + _LENGTH:
            begin = start + _LENGTH
            size = int.from_bytes(waiting[start:begin], "big")
            if size > LONGEST_EVENT:
                raise FramingError(f"Expected frames of at most {LONGEST_EVENT} bytes, got one of {size}")
            if len(waiting) < begin + size:
                break
            start = begin + size
            yield bytes(waiting[begin:start])
        del waiting[:start]
