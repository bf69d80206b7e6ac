"""One answer of the API server over HTTP, and what can go wrong while it is read."""
# ruff: noqa: PLC0415 - urllib3 costs megabytes, and only those who have a client need it

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from kproxy.kube.codec.streams import split_frames, split_lines

_CHUNK = 1 << 16


class TransportError(Exception):
    """No connection, or it broke; the message is one line."""


class SilenceError(TransportError):
    """Nothing arrived for the timeout of the request."""


class ApiResponse:
    """One HTTP answer: `status`, `headers`, and the body by `read`, `lines` or `frames`.

    `generation` counts the credentials that the client had loaded when it sent the request.
    """

    def __init__(self, raw: Any, generation: int) -> None:
        self.status = int(raw.status)
        self.headers: Mapping[str, str] = raw.headers
        self.generation = generation
        self._raw = raw

    def read(self) -> bytes:
        """Return the whole body, decompressed. Raises `TransportError`."""
        with TransportErrors():
            body: bytes = self._raw.read(decode_content=True)
            return body

    @property
    def media_type(self) -> str:
        """Return the type of the body in lower case, without parameters, "" if it is not said."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def lines(self) -> Iterator[bytes]:
        """Yield each complete line without its end, as soon as it is there; what follows the last is dropped.

        Raises `FramingError`, `SilenceError` if nothing arrives for the request's timeout, else `TransportError`
        if the connection breaks off; ends normally if the server ended the answer.
        """
        return split_lines(self._chunks())

    def frames(self) -> Iterator[bytes]:
        """Yield each complete frame of a protobuf watch without its length; otherwise like `lines`."""
        return split_frames(self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        chunked = getattr(self._raw, "chunked", False)
        source = self._raw.read_chunked(_CHUNK, decode_content=True) if chunked else None
        while True:
            with TransportErrors():
                chunk = next(source, b"") if source else self._raw.read1(_CHUNK, decode_content=True)
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """Cut the connection. For any thread: one that waits for data wakes up, and is to call `release`."""
        with suppress(OSError, ValueError, RuntimeError):  # read to its end, or closed already
            self._raw.shutdown()

    def release(self) -> None:
        """Give up the answer, read to its end or not. Only for the thread that reads."""
        self._raw.close()

    def __enter__(self) -> ApiResponse:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class TransportErrors:
    """Turns the exceptions of urllib3 and of sockets into `TransportError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        if isinstance(error, ReadTimeoutError | TimeoutError):
            raise SilenceError("nothing arrived in time") from None
        # A read on an answer that another thread closes ends in whatever its half-closed state gives.
        if isinstance(error, HTTPError | OSError):
            raise TransportError(" ".join(str(error).split()) or type(error).__name__) from None
        if isinstance(error, ValueError | AttributeError):
            # Its text may quote what was to be sent, for instance a header with a token.
            raise TransportError(f"the connection ended in a {type(error).__name__}") from None
