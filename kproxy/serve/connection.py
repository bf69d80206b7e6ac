"""One client's connection: a request at a time, each answered before the next is looked at."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from enum import Enum, auto
from http import HTTPStatus
from selectors import EVENT_READ, EVENT_WRITE

from kproxy.serve.http import Handler, Request, RequestError, Response, encode, plain, take_request

log = logging.getLogger(__name__)

_CHUNK = 16 * 1024


class State(Enum):
    """What a connection waits for."""

    IDLE = auto()
    """A request."""
    RECEIVING = auto()
    """The rest of a request."""
    SENDING = auto()
    """The client, to take the answer."""
    QUEUED = auto()
    """Its turn: a request came together with the one before."""
    DRAINING = auto()
    """The client to hang up: closing first might reset the connection and take the last answer from it."""
    OVER = auto()
    """Nothing: the socket can be closed."""


PATIENCE = {
    State.IDLE: 60.0,  # scrapers come back within a minute
    State.RECEIVING: 10.0,
    State.SENDING: 10.0,
    State.QUEUED: 10.0,
    State.DRAINING: 2.0,
    State.OVER: 0.0,
}
"""How many seconds a connection may be in each state."""


class Connection:
    """A client's socket, which does not block, and how far the conversation is.

    `deadline`, by the clock whose `now` is passed in, is when patience with the client ends.
    """

    def __init__(self, client: socket.socket, handler: Handler, wall: Callable[[], float], now: float) -> None:
        self.socket = client
        self._handler = handler
        self._wall = wall
        self._incoming = bytearray()
        self._outgoing = b""
        self._last = False
        self._become(State.IDLE, now)

    @property
    def events(self) -> int:
        """What to wait for, as `selectors` names it; 0 once the connection is over and its socket to be closed."""
        if self._state is State.OVER:
            return 0
        return EVENT_WRITE if self._state in {State.SENDING, State.QUEUED} else EVENT_READ

    def proceed(self, now: float) -> None:
        """Go on as far as possible without waiting."""
        try:
            if self._state is State.SENDING:
                self._send(now)
            elif self._state is State.QUEUED:
                self._next(now)
            else:
                self._receive(now)
        except BlockingIOError:
            pass
        except OSError:  # the client is gone: nobody to tell
            self._become(State.OVER, now)

    def _become(self, state: State, now: float) -> None:
        self._state = state
        self.deadline = now + PATIENCE[state]

    def _receive(self, now: float) -> None:
        received = self.socket.recv(_CHUNK)
        if not received:
            self._become(State.OVER, now)
        elif self._state is not State.DRAINING:
            self._incoming += received
            self._next(now)

    def _next(self, now: float) -> None:
        try:
            request = take_request(self._incoming)
        except RequestError as error:
            self._answer(plain(error.status, f"{error}\n"), now, head_only=False, last=True)
            return
        if request is not None:
            response = self._handle(request)
            self._answer(response, now, head_only=request.method == "HEAD", last=not request.persistent)
        elif self._state is not State.RECEIVING:
            self._become(State.RECEIVING, now)

    def _handle(self, request: Request) -> Response:
        try:
            return self._handler(request)
        except Exception as error:  # a bug in one page must not end the others
            log.error("%s %s failed: unexpected %r", request.method, request.path, error)
            log.debug("where it failed", exc_info=error)
            return plain(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error\n")

    def _answer(self, response: Response, now: float, *, head_only: bool, last: bool) -> None:
        self._outgoing = encode(response, self._wall(), head_only=head_only, close=last)
        self._last = last
        self._become(State.SENDING, now)
        self._send(now)

    def _send(self, now: float) -> None:
        self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        if self._outgoing:
            return
        if self._last:
            self.socket.shutdown(socket.SHUT_WR)
            self._become(State.DRAINING, now)
        else:
            self._become(State.QUEUED if self._incoming else State.IDLE, now)
