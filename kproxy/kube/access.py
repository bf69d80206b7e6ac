"""What a way to the API server is: where the server is, connections to it, and how it knows us."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]
"""Socket options by which a peer that vanished is found within a minute."""

CONNECTIONS = 8
"""How many idle connections are kept.

More than threads use the client, one for each kind of object and one for events: urllib3 warns of those that find no
place.
"""

IN_CLUSTER = "in-cluster service account"

_IMPERSONATION = ("as", "as-groups", "as-uid", "as-user-extra")
_AUTHORITY = ("certificate-authority", "certificate-authority-data")

log = logging.getLogger(__name__)


class ClientError(Exception):
    """The configuration or the credentials cannot be used; the message is one line: which file, what, why."""


class Access(Protocol):
    """A way to the API server."""

    @property
    def server(self) -> str:
        """The server's URL."""

    @property
    def rotates(self) -> bool:
        """Whether it is from files that others replace in time, so that it has to be loaded anew now and then."""

    @property
    def pool(self) -> Any:
        """The connections, a `urllib3.PoolManager`."""

    def authentication(self) -> dict[str, str]:
        """Return the headers by which the server knows us. Raises `ClientError` if they cannot be had."""


def check_server(server: str, source: str | None) -> None:
    """Raise `ClientError`, naming the file it is from if there is one, unless `server` is a URL to talk HTTP to."""
    where = f"{source}: server" if source else "server"
    try:
        parts = urlsplit(server)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ClientError(f"{where} {server!r} is no URL like https://10.0.0.1:6443")


def check_entries(cluster: Mapping[str, Any], user: Mapping[str, Any], source: str) -> None:
    """Raise `ClientError` if a kubeconfig's `cluster` or `user` asks for what must not be passed over in silence.

    Who did so with impersonation would act as the more powerful user; with a certificate authority that is not to be
    asked, nobody can know which of both was meant, and kubectl refuses that too. `source` is the file.
    """
    if asked := [name for name in _IMPERSONATION if user.get(name)]:
        raise ClientError(f"{source}: user: {', '.join(asked)}: impersonation is not supported")
    authority = next((name for name in _AUTHORITY if cluster.get(name)), "")
    if authority and cluster.get("insecure-skip-tls-verify"):
        raise ClientError(f"{source}: cluster: {authority} and insecure-skip-tls-verify exclude each other")


def read_token(user: Mapping[str, Any], folder: Path, source: str, *, first: bool) -> str:
    """Return the token of a kubeconfig's `user`, "" if it has none.

    A `tokenFile`, which counts from `folder`, comes before a `token`. Where it is of no use, the token stands in, but
    only when it is the `first` time: afterwards what the file held before is better. Raises `ClientError`.
    """
    token, name = str(user.get("token") or ""), user.get("tokenFile")
    if name:
        path = folder / name
        try:
            return usable_token(read_file(source, path), f"{source}: {path}")
        except ClientError as error:
            if not (first and token):
                raise
            log.warning("%s; using the token of the kubeconfig instead", error)
    return usable_token(token, f"{source}: token") if token else ""


def usable_token(token: str | bytes, where: str) -> str:
    """Return a token without the white space around it.

    Raises `ClientError`, which begins with `where` and never quotes the token, if none is left, or one that no header
    can carry: other than visible ASCII (RFC 9110, section 5.5).
    """
    text = (token if isinstance(token, str) else token.decode(errors="replace")).strip()
    if not text:
        raise ClientError(f"{where}: the token is empty")
    if not all("!" <= character <= "~" for character in text):
        raise ClientError(f"{where}: the token is not a single word of visible ASCII characters")
    return text


def read_file(source: str, path: Path) -> bytes:
    """Return what a file holds. Raises `ClientError`, which begins with `source`, if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(f"{source}: {path}: {error.strerror}") from None
