"""The decoder of the chunked transfer coding, compared to the one of `http.client`."""

from __future__ import annotations

import http.client
import io
import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kproxy.kube.client.chunked import MAX_LINE_BYTES, ChunkedDecoder

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

contents = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
extensions = st.sampled_from([b"", b";name=value", b" ; name", b"  "])
trailers = st.sampled_from([b"", b"Expires: never\r\n", b"A: 1\r\nB: 2\r\n"])


def encoded(chunks: list[bytes], extension: bytes, trailer: bytes) -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(each), extension, each) for each in chunks)
    return body + b"0\r\n" + trailer + b"\r\n"


def decoded(body: bytes, cuts: list[int]) -> tuple[bytes, ChunkedDecoder]:
    decoder, content = ChunkedDecoder(), b""
    positions = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(positions):
        content += decoder.decode(body[start:end])
    return content, decoder


class Connection:
    """A connection that has received some bytes, for `http.client`."""

    def __init__(self, received: bytes) -> None:
        self._received = received

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._received)


def from_http_client(body: bytes) -> bytes:
    connection: socket.socket = Connection(HEAD + body)  # type: ignore[assignment]  # only `makefile` is used
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.read()


@given(contents, extensions, trailers, st.lists(st.integers(0, 10_000), max_size=12), st.binary(max_size=5))
def test_content_is_independent_of_the_pieces(
    chunks: list[bytes], extension: bytes, trailer: bytes, cuts: list[int], excess: bytes
) -> None:
    body = encoded(chunks, extension, trailer)
    content, decoder = decoded(body + excess, cuts)
    assert content == b"".join(chunks) == from_http_client(body)
    assert (decoder.complete, decoder.excess, decoder.problem) == (True, excess, "")


@given(contents, extensions, st.integers(0, 10_000), st.lists(st.integers(0, 10_000), max_size=6))
def test_incomplete_body(chunks: list[bytes], extension: bytes, length: int, cuts: list[int]) -> None:
    body = encoded(chunks, extension, b"")
    body = body[: length % len(body)]
    content, decoder = decoded(body, cuts)
    assert b"".join(chunks).startswith(content)
    assert (decoder.complete, decoder.problem) == (False, "")


@pytest.mark.parametrize(
    ("body", "content", "problem"),
    [
        (b"3\r\nabc\r\n\r\n", b"abc", "hexadecimal"),
        (b"3\r\nabc\r\n-3\r\nabc\r\n", b"abc", "hexadecimal"),
        (b"0x3\r\nabc\r\n", b"", "hexadecimal"),
        (b"1_0\r\n", b"", "hexadecimal"),
        (b"11111111111111111\r\n", b"", "hexadecimal"),
        (b"3\r\nabcd\r\n", b"", "line break"),
        (b"3\r\nabc\n\n3\r\nabc\r\n", b"", "line break"),
        (b"3;" + b"x" * MAX_LINE_BYTES, b"", "too long"),
        (b"3;" + b"x" * MAX_LINE_BYTES + b"\r\n", b"", "too long"),
        (b"3\r\nabc\r\n0\r\n" + b"A: 1\r\n" * (MAX_LINE_BYTES // 6 + 1), b"abc", "too long"),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_problems(body: bytes, content: bytes, problem: str, piece: int) -> None:
    found, decoder = decoded(body, list(range(0, len(body), piece)))
    assert found.startswith(content)
    assert problem in decoder.problem
    assert not decoder.complete
    assert decoder.decode(b"\r\n0\r\n\r\n") == b""
