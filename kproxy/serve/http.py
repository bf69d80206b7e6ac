"""HTTP/1.1 as far as health checks and scrapes need it (RFC 9110, RFC 9112): requests in, answers out. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import TypeAlias

import msgspec
from msgspec import Struct

MAX_HEAD = 16 * 1024
"""How many bytes a request may have before its empty line; probes have a few hundred."""
_END = re.compile(rb"\r?\n\r?\n")
_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([^\s]+) HTTP/([0-9])\.([0-9])")
_ABSOLUTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")
NO_SNIFF = ("X-Content-Type-Options", "nosniff")


class RequestError(ValueError):
    """A request that cannot be answered as asked; the message says why, `status` is what to answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class HttpRequest(Struct, frozen=True):
    """A request without its body. Names of `headers` are in lower case.

    `persistent` says whether the connection can take another request: not if the client closes it, nor if there is
    a body, which nothing here reads.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    persistent: bool


class HttpResponse(Struct, frozen=True):
    """An answer; date and length are added when it is sent."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


Handler: TypeAlias = Callable[[HttpRequest], HttpResponse]
"""Answers a request, in the server's thread: quick, and only from memory or the kernel."""


def plain(status: int, text: str) -> HttpResponse:
    """Return a text as an answer."""
    return HttpResponse(status, (("Content-Type", "text/plain; charset=utf-8"), NO_SNIFF), text.encode())


def json(status: int, data: object) -> HttpResponse:
    """Return data as an answer in JSON, without white space."""
    return HttpResponse(status, (("Content-Type", "application/json"), NO_SNIFF), msgspec.json.encode(data))


def routes(handlers: Mapping[str, Handler]) -> Handler:
    """Return a handler that hands each path to its own handler, and knows no others."""

    def route(request: HttpRequest) -> HttpResponse:
        handler = handlers.get(request.path)
        return handler(request) if handler else plain(HTTPStatus.NOT_FOUND, "404 page not found\n")

    return route


def take_request(buffer: bytearray) -> HttpRequest | None:
    """Take the next request off what has been received, None if it is not complete. Raises `RequestError`."""
    while buffer and buffer[0] in b"\r\n":
        del buffer[:1]  # RFC 9112, 2.2: empty lines before a request are ignored
    end = _END.search(buffer)
    if (end.start() if end else len(buffer)) > MAX_HEAD:
        raise RequestError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MAX_HEAD} bytes of headers")
    if end is None:
        return None
    lines = buffer[: end.start()].decode("latin-1").replace("\r\n", "\n").split("\n")
    del buffer[: end.end()]
    return _request(lines[0], _headers(lines[1:]))


def _request(line: str, headers: dict[str, str]) -> HttpRequest:
    match = _LINE.fullmatch(line)
    if match is None:
        raise RequestError(HTTPStatus.BAD_REQUEST, "malformed request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise RequestError(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, f"HTTP/1.1 is spoken here, not HTTP/{major}.{minor}")
    if minor != "0" and "host" not in headers:
        raise RequestError(HTTPStatus.BAD_REQUEST, "no Host header")
    path = _ABSOLUTE.sub("", target, count=1).partition("?")[0] or "/"
    wishes = {wish.strip().lower() for wish in headers.get("connection", "").split(",")}
    stays = "keep-alive" in wishes if minor == "0" else "close" not in wishes
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    return HttpRequest(method, path, headers, stays and not has_body)


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
    """Return an answer as it goes over the wire. `wall` is the time in seconds since the epoch."""
    lines = [
        f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
        *(f"{name}: {value}" for name, value in response.headers),
        f"Date: {formatdate(wall, usegmt=True)}",
        f"Content-Length: {len(response.body)}",
        *(["Connection: close"] if close else []),
    ]
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if head_only else head + response.body
