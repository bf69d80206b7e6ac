"""The part of HTTP/1.1 that health checks and scrapes need: parse requests, encode responses (RFC 9110, 9112). Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import TypeAlias

import msgspec
from msgspec import Struct

MAX_HEAD = 16 * 1024
"""Maximum size of the request line and headers of a request, in bytes. Health probes send a few hundred bytes."""
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\s]+) HTTP/([0-9])\.([0-9])")
_SCHEME_AND_HOST = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")
NO_SNIFF = ("X-Content-Type-Options", "nosniff")


class RequestError(ValueError):
    """A request that cannot be served. The message gives the reason; `status` is the HTTP status to respond with."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class HttpRequest(Struct, frozen=True):
    """A request without its body. `path` does not include the query. The names in `headers` are in lower case.

    `persistent` is true if the connection can carry another request. It is false in two cases: the client wants the
    connection to be closed (the default in HTTP/1.0), or the request has a body, which the server does not read.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    persistent: bool


class HttpResponse(Struct, frozen=True):
    """A response. `encode` adds the Date and Content-Length headers."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


Handler: TypeAlias = Callable[[HttpRequest], HttpResponse]
"""Responds to a request.

A handler runs in the server's thread, so it must not block. It may use values in memory and query the kernel.
"""


def plain(status: int, text: str) -> HttpResponse:
    """Return a plain text response."""
    return HttpResponse(status, (("Content-Type", "text/plain; charset=utf-8"), NO_SNIFF), text.encode())


def json(status: int, data: object) -> HttpResponse:
    """Return a JSON response. The JSON contains no white space between values."""
    return HttpResponse(status, (("Content-Type", "application/json"), NO_SNIFF), msgspec.json.encode(data))


def routes(handlers: Mapping[str, Handler]) -> Handler:
    """Return a handler that selects one of `handlers` by the request's path, and responds with 404 to other paths."""

    def route(request: HttpRequest) -> HttpResponse:
        handler = handlers.get(request.path)
        return handler(request) if handler else plain(HTTPStatus.NOT_FOUND, "404 page not found\n")

    return route


def pop_request(buffer: bytearray) -> HttpRequest | None:
    """Remove the next request from `buffer`, which contains the received bytes, and return the request.

    Return None if the request is incomplete. Raises `RequestError` if it is malformed or too large, or if its HTTP
    version is not supported.
    """
    while buffer and buffer[0] in b"\r\n":
        del buffer[:1]  # empty lines before a request are ignored (RFC 9112, section 2.2)
    end = _END_OF_HEAD.search(buffer)
    if (end.start() if end else len(buffer)) > MAX_HEAD:
        raise RequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEAD} bytes of headers")
    if end is None:
        return None
    lines = buffer[: end.start()].decode("latin-1").replace("\r\n", "\n").split("\n")
    del buffer[: end.end()]
    return _request(lines[0], _headers(lines[1:]))


def _request(line: str, headers: dict[str, str]) -> HttpRequest:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise RequestError(HTTPStatus.BAD_REQUEST, "malformed request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise RequestError(
            HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/{major}.{minor} is not supported, use HTTP/1.1"
        )
    if minor != "0" and "host" not in headers:
        raise RequestError(HTTPStatus.BAD_REQUEST, "no Host header")
    path = _SCHEME_AND_HOST.sub("", target, count=1).partition("?")[0] or "/"
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    keeps_alive = "keep-alive" in options if minor == "0" else "close" not in options
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    return HttpRequest(method, path, headers, keeps_alive and not has_body)


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise RequestError(HTTPStatus.BAD_REQUEST, "malformed header")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def encode(response: HttpResponse, wall: float, *, head_only: bool, close: bool) -> bytes:
    """Encode a response. `wall` is the current time in seconds since the epoch.

    With `head_only`, the body is omitted, as for a HEAD request. With `close`, the header `Connection: close` is added.
    """
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        *(f"{name}: {value}" for name, value in response.headers),
        f"Date: {formatdate(wall, usegmt=True)}",
        f"Content-Length: {len(response.body)}",
        *(["Connection: close"] if close else []),
    ]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if head_only else head + response.body
