"""HTTP responses from the API server, and connection errors. A body is read either as a whole or as a stream."""
# ruff: noqa: PLC0415 - urllib3 takes megabytes of memory; only processes with a client load it

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

_CHUNK_SIZE = 1 << 16


class TransportError(Exception):
    """The connection could not be opened, or it broke. The message is one line."""


class IdleTimeoutError(TransportError):
    """The server sent no data before the request's timeout expired."""


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

    def read(self) -> bytes:
        """Return the whole body, decompressed. Raises `TransportError`."""
        with TransportErrors():
            body: bytes = self._raw.read(decode_content=True)
            return body

    def chunks(self) -> Iterator[bytes]:
        """Yield the decompressed body in pieces, as they arrive.

        The iterator ends at the end of the response. Raises `IdleTimeoutError` if nothing arrives within the request's
        timeout, and `TransportError` if the connection breaks.
        """
        chunked = getattr(self._raw, "chunked", False)
        source = self._raw.read_chunked(_CHUNK_SIZE, decode_content=True) if chunked else None
        while True:
            with TransportErrors():
                chunk = next(source, b"") if source else self._raw.read1(_CHUNK_SIZE, decode_content=True)
            if not chunk:
                return
            yield chunk

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
