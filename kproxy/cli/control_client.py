"""Ask the daemon that runs in this network namespace, through its control socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import TypeVar
from urllib.parse import quote

import msgspec
from msgspec.structs import replace

from kproxy.cli.console import CannotTellError
from kproxy.model.daemon_status import CONTROL_NAME, DaemonStatus
from kproxy.model.object_page import ObjectPage
from kproxy.model.plan import plan_service
from kproxy.model.service_state import FamilyWaiting, ServiceState
from kproxy.model.types import Family, ServiceKey
from kproxy.serve.control import peer_user

TIMEOUT_SECONDS = 10.0
NO_DAEMON = (
    "no kproxy daemon answers in this network namespace; run this command on the node, or in the kproxy pod: "
    "kubectl -n kube-system exec ds/kproxy -- kproxy ..."
)
T = TypeVar("T")


class _ControlConnection(HTTPConnection):
    """HTTP on the control socket."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_SECONDS)
        self.sock.connect(CONTROL_NAME)
        if (user := peer_user(self.sock)) not in {0, os.geteuid()}:
            # Any process may listen at the name of an abstract socket while no daemon does.
            raise CannotTellError(f"a process of user {user}, which is not a kproxy daemon, has the control socket")


def fetch_status() -> DaemonStatus:
    """Return the state of the daemon. Raises `CannotTellError` if there is none, or if it does not answer."""
    return _fetch("GET", "/status", DaemonStatus)


def fetch_service_names() -> list[ServiceKey]:
    """Return the keys of all Services of the daemon. Raises `CannotTellError`."""
    return _fetch("GET", "/services", list[ServiceKey])


def fetch_service(key: ServiceKey) -> ServiceState:
    """Return what the daemon knows about one Service. Raises `CannotTellError`."""
    namespace, _, name = key.partition("/")
    state = _fetch("GET", f"/services/{quote(namespace, safe='')}/{quote(name, safe='')}", ServiceState)
    if state.service is None:
        return state
    families = {
        family: replace(each, plans=plan_service(state.service, state.slices, each.context)) if each.context else each
        for family, each in state.families.items()
    }
    return replace(state, families=families)


def fetch_waiting() -> dict[Family, FamilyWaiting]:
    """Return the Services that the kernel does not have as they are. Raises `CannotTellError`."""
    return _fetch("GET", "/waiting", dict[Family, FamilyWaiting])


def fetch_objects() -> Iterator[ObjectPage]:
    """Yield pages of all objects of the daemon. Raises `CannotTellError`."""
    start = ""
    while True:
        page = _fetch("GET", f"/objects/{quote(start, safe='')}", ObjectPage)
        yield page
        start = page.following
        if not start:
            return


def fetch_configuration() -> dict[str, object]:
    """Return the daemon's configuration, as the content of a configuration file. Raises `CannotTellError`."""
    return _fetch("GET", "/configuration", dict[str, object])


def fetch_log() -> list[str]:
    """Return the latest lines of the daemon's log. Raises `CannotTellError`."""
    return _fetch("GET", "/log", list[str])


def fetch_metrics() -> str:
    """Return the daemon's metrics in Prometheus' text format. Raises `CannotTellError`."""
    return _exchange("GET", "/metrics").decode()


def change_verbosity(verbosity: int) -> None:
    """Change the daemon's log verbosity. Raises `CannotTellError`."""
    _fetch("PUT", f"/verbosity/{verbosity}", type(None))


def _fetch(method: str, path: str, kind: type[T]) -> T:
    body = _exchange(method, path)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise CannotTellError(
            f"the kproxy daemon has another version than this command: {error}; use the command in the daemon's pod"
        ) from None


def _exchange(method: str, path: str) -> bytes:
    connection = _ControlConnection("kproxy", timeout=TIMEOUT_SECONDS)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        body = response.read()
    except (ConnectionRefusedError, FileNotFoundError):
        raise CannotTellError(NO_DAEMON) from None
    except TimeoutError:
        raise CannotTellError(f"the kproxy daemon has not answered within {TIMEOUT_SECONDS:.0f} s") from None
    except (OSError, HTTPException) as error:
        raise CannotTellError(f"cannot ask the kproxy daemon: {error}") from None
    finally:
        connection.close()
    if response.status != HTTPStatus.OK:
        raise CannotTellError(f"the kproxy daemon refuses: {body.decode(errors='replace').strip()}")
    return body
