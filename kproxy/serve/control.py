"""The control socket: what `kproxy status` and the other commands ask a running daemon. Only root may ask."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Protocol
from urllib.parse import unquote

from kproxy.model.daemon_status import CONTROL_NAME, DaemonStatus
from kproxy.model.object_page import ObjectPage
from kproxy.model.service_state import FamilyWaiting, ServiceState
from kproxy.model.types import Family, ServiceKey
from kproxy.serve.http import Handler, HttpRequest, HttpResponse, json, plain
from kproxy.serve.server import BACKLOG

_CREDENTIALS = struct.Struct("3i")


class Control(Protocol):
    """Answers the requests. The methods run in the server's thread and must not block."""

    def status(self) -> DaemonStatus:
        """Return the state of the daemon."""

    def service_names(self) -> Sequence[ServiceKey]:
        """Return the keys of all Services."""

    def service(self, key: ServiceKey) -> ServiceState:
        """Return the state of one Service."""

    def waiting(self) -> Mapping[Family, FamilyWaiting]:
        """Return the Services that the kernel does not have as they are."""

    def objects(self, start: str) -> ObjectPage:
        """Return a page of the objects, in the order of their names. `start` is "" for the first page."""

    def configuration(self) -> Mapping[str, object]:
        """Return the configuration in use, as the content of a configuration file."""

    def log_lines(self) -> Sequence[str]:
        """Return the latest lines of the log, oldest first."""

    def set_verbosity(self, verbosity: int) -> None:
        """Change the log verbosity until the process ends."""


def listen_for_control(name: str = CONTROL_NAME) -> socket.socket:
    """Open the control socket of this network namespace. Raises `OSError`, for example if another daemon has it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(name)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def peer_user(connection: socket.socket) -> int:
    """Return the user ID of the process at the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user


def control_handler(control: Control, metrics: Handler) -> Callable[[socket.socket], Handler]:
    """Return a function that chooses the handler for a client: only root and the daemon's own user get answers.

    `metrics` answers requests for the metrics.
    """
    handler = _handler(control, metrics)

    def choose(client: socket.socket) -> Handler:
        return handler if peer_user(client) in {0, os.geteuid()} else _forbid

    return choose


def _forbid(_: HttpRequest) -> HttpResponse:
    return plain(HTTPStatus.FORBIDDEN, "only root may ask the daemon\n")


def _handler(control: Control, metrics: Handler) -> Handler:  # noqa: C901 - as below
    def handle(request: HttpRequest) -> HttpResponse:  # noqa: PLR0911 - one return for each kind of request
        match request.path.split("/")[1:]:
            case ["status"] if request.method == "GET":
                return json(HTTPStatus.OK, control.status())
            case ["services"] if request.method == "GET":
                return json(HTTPStatus.OK, control.service_names())
            case ["services", namespace, name] if request.method == "GET":
                return json(HTTPStatus.OK, control.service(f"{unquote(namespace)}/{unquote(name)}"))
            case ["waiting"] if request.method == "GET":
                return json(HTTPStatus.OK, control.waiting())
            case ["objects", start] if request.method == "GET":
                return json(HTTPStatus.OK, control.objects(unquote(start)))
            case ["configuration"] if request.method == "GET":
                return json(HTTPStatus.OK, control.configuration())
            case ["log"] if request.method == "GET":
                return json(HTTPStatus.OK, control.log_lines())
            case ["metrics"] if request.method == "GET":
                return metrics(request)
            case ["verbosity", digits] if request.method == "PUT" and digits.isdecimal():
                control.set_verbosity(int(digits[:3]))
                return json(HTTPStatus.OK, None)
        return plain(HTTPStatus.NOT_FOUND, f"unknown request {request.method} {request.path}\n")

    return handle
