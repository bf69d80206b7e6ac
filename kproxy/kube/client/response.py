"""HTTP responses from the API server, and connection errors. A body is read either as a whole or as a stream.

Whatever the server sends, a response takes a bounded amount of memory. Bodies that are read as a whole have a maximum
size, pieces of a stream are small even if they are compressed, and the sizes of headers and chunk lines are limited.
"""
# ruff: noqa: PLC0415 - urllib3 takes megabytes of memory; only processes with a client load it

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from kproxy.kube.client.chunked import ChunkedDecoder

MAX_BODY_BYTES = 64 << 20
"""Default maximum size of a body that is read as a whole, in bytes, after decompression."""
_CHUNK_SIZE = 1 << 16


class TransportError(Exception):
    """The connection could not be opened, or it broke. The message is one line."""


class IdleTimeoutError(TransportError):
    """The server sent no data before the request's timeout expired."""


class BodyTooLargeError(TransportError):
    """The body of a response is larger than the caller accepts."""


class ApiResponse:
    """One HTTP response.

    `status` and `headers` are available at once. Read the body as a whole with `read`, or in pieces as they arrive with
    `chunks`. `credentials` are the authentication headers of the request (see `ApiClient.renew`).
    """

    def __init__(self, raw: Any, credentials: Mapping[str, str]) -> None:
        self.status = int(raw.status)
        self.headers: Mapping[str, str] = raw.headers
        self.credentials = credentials
        self._raw = raw

    @property
    def media_type(self) -> str:
        """Return the media type of the body in lower case and without parameters, or "" if the server sent none."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def read(self, limit: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body, decompressed.

        Raises `BodyTooLargeError` if it has more than `limit` bytes, and `TransportError`.
        """
        pieces = []
        size = 0
        for piece in self.chunks():
            size += len(piece)
            if size > limit:
                raise BodyTooLargeError(f"the response exceeds the maximum of {limit} bytes")
            pieces.append(piece)
        return b"".join(pieces)

    def read_start(self, limit: int) -> bytes:
        """Return the first `limit` bytes of the body, decompressed, or all of it. Raises `TransportError`."""
        start = bytearray()
        for piece in self.chunks():
            start += piece
            if len(start) >= limit:
                break
        return bytes(start[:limit])

    def chunks(self) -> Iterator[bytes]:
        """Yield the decompressed body in pieces of at most 64 KiB, as they arrive.

        The iterator ends at the end of the response. Raises `IdleTimeoutError` if nothing arrives within the request's
        timeout, and `TransportError` if the connection breaks or the body cannot be decompressed.
        """
        encoding = self.headers.get("Content-Encoding", "").strip().lower()
        if encoding in {"gzip", "x-gzip"}:
            yield from _decompressed(self._received())
        elif encoding in {"", "identity"}:
            yield from self._received()
        else:
            raise TransportError(f"unsupported Content-Encoding {encoding[:20]!r}")

    def _received(self) -> Iterator[bytes]:
        original: Any = getattr(self._raw, "_original_response", None)  # of http.client
        if getattr(original, "chunked", False) and original.chunk_left is None:
            return self._received_chunked(original)
        return self._received_plain()

    def _received_plain(self) -> Iterator[bytes]:
        with TransportErrors():
            while piece := self._raw.read1(_CHUNK_SIZE, decode_content=False):
                yield piece

    def _received_chunked(self, original: Any) -> Iterator[bytes]:
        """Like `_received_plain`, but in a fraction of the time if the body has many small chunks."""
        decoder = ChunkedDecoder()
        with TransportErrors():
            while not decoder.complete:
                received = original.fp.read1(_CHUNK_SIZE)
                if not received:
                    raise TransportError("the connection was closed before the end of the response")
                if piece := decoder.decode(received):
                    yield piece
                if decoder.problem:
                    raise TransportError(f"invalid chunked encoding: {decoder.problem}")
            if not decoder.excess:
                original.close()  # the end of the response, so the connection can be used for another request
                self._raw.release_conn()

    def close(self) -> None:
        """Shut down the connection. Any thread may call this method.

        A thread that is reading the body wakes up. It must then call `release`.
        """
        with suppress(OSError, ValueError, RuntimeError):  # body fully read, or response already closed
            self._raw.shutdown()

    def release(self) -> None:
        """Release the connection, even if the body was not read to the end. Only the reading thread may call this."""
        self._raw.close()

    def __enter__(self) -> ApiResponse:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _decompressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress gzip (RFC 1952) in pieces of at most `_CHUNK_SIZE` bytes. Raises `TransportError`."""
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    for chunk in chunks:
        rest = chunk
        while rest:
            try:
                piece = decoder.decompress(rest, _CHUNK_SIZE)
            except zlib.error as error:
                raise TransportError(f"cannot decompress the response: {error}") from None
            rest = decoder.unconsumed_tail
            if decoder.eof and decoder.unused_data:  # another member follows
                rest, decoder = decoder.unused_data, zlib.decompressobj(16 + zlib.MAX_WBITS)
            if piece:
                yield piece
    # Without more input, the decoder may still have output that did not fit into the last piece.
    while piece := decoder.decompress(b"", _CHUNK_SIZE):
        yield piece
    if not decoder.eof:
        raise TransportError("cannot decompress the response: it is cut off")


class TransportErrors:
    """A context manager that converts exceptions of urllib3 and of sockets to `TransportError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        if isinstance(error, ReadTimeoutError | TimeoutError):
            raise IdleTimeoutError("timed out waiting for data") from None
        if isinstance(error, HTTPError | OSError):
            raise TransportError(" ".join(str(error).split()) or type(error).__name__) from None
        # Reading a response that another thread is closing can raise ValueError or AttributeError. The text of the
        # exception is omitted from the message, because it may quote a header that contains a token.
        if isinstance(error, ValueError | AttributeError):
            raise TransportError(f"connection failed with {type(error).__name__}") from None
