"""Access to the API server with static credentials: address, connections and authentication headers."""
# ruff: noqa: PLC0415 - only those who have a client need urllib3, and a kubeconfig PyYAML

from __future__ import annotations

import base64
import binascii
import logging
import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from msgspec import Struct

from kproxy.kube.client.http_proxy import http_proxy_for

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


class ClusterAccess(Protocol):
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


SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet mounts a Pod's token and the certificate authority of the API server."""
_FILES = {"tokenFile", "certificate-authority", "client-certificate", "client-key"}
_CLUSTER = {
    "server",
    "certificate-authority",
    "certificate-authority-data",
    "insecure-skip-tls-verify",
    "tls-server-name",
    "extensions",
}
_USER = {
    "token",
    "tokenFile",
    "client-certificate",
    "client-certificate-data",
    "client-key",
    "client-key-data",
    "extensions",
}


class PemData(Struct, frozen=True):
    """Certificates or a key: the text, and the file or field that it is from."""

    content: bytes
    source: str


class StaticConfig(Struct, frozen=True):
    """All that a plain way to the server consists of; two that are equal need but one pool of connections.

    Without an `authority` the system's count; `insecure` checks none at all. `server_name` stands in the server's
    certificate instead of its host. `rotates`: see `ClusterAccess`.
    """

    source: str
    server: str
    token: str = ""
    rotates: bool = False
    authority: PemData | None = None
    certificate: PemData | None = None
    key: PemData | None = None
    insecure: bool = False
    server_name: str = ""


class StaticAccess:
    """A way to the server (`kproxy.kube.client.cluster_access.ClusterAccess`) by plain credentials."""

    def __init__(self, plain: StaticConfig, before: object = None) -> None:
        """`before` is the access in use so far: its connections stay if only the token is another.

        Raises `ClientError` if certificates cannot be used.
        """
        self._plain = plain
        self.server = plain.server
        self.rotates = plain.rotates
        self.pool: Any
        if isinstance(before, StaticAccess) and _without_token(before._plain) == _without_token(plain):
            self.pool = before.pool
        else:
            self.pool = _make_pool(plain)

    def authentication(self) -> dict[str, str]:
        """Return the header with the token, if there is one."""
        return {"Authorization": f"Bearer {self._plain.token}"} if self._plain.token else {}


def find_static_config(
    kubeconfig: str | None, server: str | None, environment: Mapping[str, str], *, first: bool = True
) -> StaticConfig | None:
    """Return the plain way to the server, None if it is not plain or anything is missing or malformed.

    `kubeconfig` None stands for the Pod's service account, or with a `server` for no credentials at all. A `server`
    replaces the URL of a kubeconfig. A server behind a proxy, that of `environment` too, is not plain. `first`: see
    `read_token`.
    Raises `ClientError` if a file that is named cannot be read, a token cannot be used, or `check_entries` says no.
    """
    if kubeconfig is not None:
        found = _from_kubeconfig(kubeconfig, server, first)
    else:
        found = StaticConfig("server", server) if server else _from_service_account(environment)
    return None if found is None or http_proxy_for(found.server, environment) else found


def _from_service_account(environment: Mapping[str, str]) -> StaticConfig:
    host, port = (environment.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
    if not (host and port):
        raise ClientError(f"{IN_CLUSTER}: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
    token, authority = SERVICE_ACCOUNT / "token", SERVICE_ACCOUNT / "ca.crt"
    return StaticConfig(
        IN_CLUSTER,
        f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        usable_token(read_file(IN_CLUSTER, token), f"{IN_CLUSTER}: {token}"),
        rotates=True,
        authority=PemData(read_file(IN_CLUSTER, authority), str(authority)),
    )


def _from_kubeconfig(path: str, server: str | None, first: bool) -> StaticConfig | None:
    import yaml

    try:
        content = yaml.safe_load(Path(path).expanduser().read_bytes())
        context = _named(content["contexts"], content["current-context"], "context")
        cluster = _named(content["clusters"], context["cluster"], "cluster")
        user = _named(content["users"], context["user"], "user") if context.get("user") else {}
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if not _is_plain(cluster, _CLUSTER) or not _is_plain(user, _USER) or not (server or cluster.get("server")):
        return None
    check_entries(cluster, user, path)
    reader = _KubeconfigReader(path)
    return StaticConfig(
        path,
        server or cluster["server"],
        read_token(user, reader.folder, path, first=first),
        rotates=any(user.get(name) or cluster.get(name) for name in _FILES),
        authority=reader.pem(cluster, "certificate-authority"),
        certificate=reader.pem(user, "client-certificate"),
        key=reader.pem(user, "client-key"),
        insecure=cluster.get("insecure-skip-tls-verify") is True,
        server_name=cluster.get("tls-server-name") or "",
    )


def _named(entries: Any, name: str, kind: str) -> Any:
    (found,) = (entry[kind] or {} for entry in entries if entry["name"] == name)
    return found


def _is_plain(fields: Any, known: set[str]) -> bool:
    if not isinstance(fields, dict) or not fields.keys() <= known:
        return False
    kinds = {"insecure-skip-tls-verify": bool, "extensions": object}
    return all(isinstance(value, kinds.get(name, str)) for name, value in fields.items())


class _KubeconfigReader:
    """Reads what a kubeconfig names; its paths count from the folder that it is in."""

    def __init__(self, kubeconfig: str) -> None:
        self._kubeconfig = kubeconfig
        self.folder = Path(kubeconfig).expanduser().parent

    def pem(self, fields: Mapping[str, Any], name: str) -> PemData | None:
        """Return what a field holds in base64 (`NAME-data`, which comes first) or names a file of, None if neither."""
        if encoded := fields.get(f"{name}-data"):
            try:
                return PemData(base64.b64decode("".join(encoded.split()), validate=True), f"{name}-data")
            except (binascii.Error, ValueError) as error:
                raise ClientError(f"{self._kubeconfig}: {name}-data is no base64: {error}") from None
        if not fields.get(name):
            return None
        path = self.folder / fields[name]
        return PemData(read_file(self._kubeconfig, path), str(path))


def _without_token(plain: StaticConfig) -> tuple[object, ...]:
    return (plain.server, plain.authority, plain.certificate, plain.key, plain.insecure, plain.server_name)


def _make_pool(plain: StaticConfig) -> Any:
    import urllib3

    if plain.insecure:  # asked for in so many words: no warning per request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    name: dict[str, Any] = {"server_hostname": plain.server_name} if plain.server_name else {}
    return urllib3.PoolManager(ssl_context=_tls(plain), maxsize=CONNECTIONS, socket_options=KEEPALIVE, **name)


def _tls(plain: StaticConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an intermediate authority alone will do, as for Go and curl
    if plain.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif plain.authority is None:
        context.load_default_certs()
    if plain.authority is not None:
        try:
            context.load_verify_locations(cadata=plain.authority.content.decode("ascii", errors="ignore"))
        except (ssl.SSLError, ValueError) as error:
            raise ClientError(
                f"{plain.source}: certificate authority {plain.authority.source}: {_reason(error)}"
            ) from None
    if plain.certificate is not None:
        key = plain.key or plain.certificate  # one file may hold both
        try:
            _load_pair(context, plain.certificate.content, key.content)
        except (OSError, ValueError) as error:
            raise ClientError(
                f"{plain.source}: client certificate {plain.certificate.source}, key {key.source}: {_reason(error)}"
            ) from None
    return context


def _load_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Load a client's certificate and key, which Python takes from files only: of memory, on no disk."""
    files = [os.memfd_create("kproxy-credentials"), os.memfd_create("kproxy-credentials")]
    try:
        for file, content in zip(files, (certificate, key), strict=True):
            os.write(file, content)
        first, second = (f"/proc/self/fd/{file}" for file in files)
        # A password callback, so that an encrypted key is an error and no question on the terminal.
        context.load_cert_chain(first, second, lambda: "")
    finally:
        for file in files:
            os.close(file)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
