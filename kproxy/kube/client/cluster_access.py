"""Access to the API server with static credentials: address, TLS settings, connections and authentication headers."""
# ruff: noqa: PLC0415 - urllib3 and PyYAML take megabytes of memory; only processes that need them load them

from __future__ import annotations

import base64
import binascii
import logging
import os
import pwd
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
"""Socket options that detect a dead peer within a minute."""
CONNECTIONS = 8
"""Maximum number of idle connections to keep.

It exceeds the number of threads that share a client (one for each kind of object, and one for events), because urllib3
logs a warning when it has to discard a connection.
"""
IN_CLUSTER = "in-cluster service account"
"""The name of the Pod's service account in messages, where other credentials have the path of a kubeconfig."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The directory where the kubelet mounts a Pod's token and the API server's certificate authority."""
_IMPERSONATION = ("as", "as-groups", "as-uid", "as-user-extra")
_AUTHORITY = ("certificate-authority", "certificate-authority-data")
_FILE_FIELDS = {"tokenFile", "certificate-authority", "client-certificate", "client-key"}
_STATIC_CLUSTER_FIELDS = {
    "server",
    "certificate-authority",
    "certificate-authority-data",
    "insecure-skip-tls-verify",
    "tls-server-name",
    "extensions",
}
_STATIC_USER_FIELDS = {
    "token",
    "tokenFile",
    "client-certificate",
    "client-certificate-data",
    "client-key",
    "client-key-data",
    "extensions",
}
log = logging.getLogger(__name__)


class ClientError(Exception):
    """The client configuration or the credentials are not usable.

    The message is one line that names the file, the field and the problem.
    """


class ClusterAccess(Protocol):
    """How to reach one API server and authenticate to it."""

    @property
    def server(self) -> str:
        """The server's URL."""

    @property
    def rotates(self) -> bool:
        """Whether it comes from files that are replaced from time to time, so that it must be reloaded regularly."""

    @property
    def pool(self) -> Any:
        """The connections, a `urllib3.PoolManager`."""

    @property
    def auth_headers(self) -> Mapping[str, str]:
        """The request headers that authenticate the client. `refresh` replaces the mapping, but never modifies it."""

    @property
    def refresh_due(self) -> bool:
        """Whether `refresh` should run before the next request, because the token has expired or is about to."""

    @property
    def expired(self) -> bool:
        """Whether the token has expired."""

    def refresh(self) -> None:
        """Get a new token. May run a program or send requests, for any length of time. Raises `ClientError`.

        Only one thread may call this at a time. Other threads may read the properties meanwhile.
        """


class PemData(Struct, frozen=True):
    """PEM text of certificates or of a key, and the file or field that it comes from."""

    content: bytes
    source: str


class StaticConfig(Struct, frozen=True):
    """The address of an API server, the TLS settings, and static credentials.

    `source` names the kubeconfig in messages. Without `authority`, the system's certificate authorities are trusted;
    with `insecure`, the server's certificate is not verified. `server_name` is the name expected in that certificate,
    by default the server's host. `rotates`: see `ClusterAccess`.
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
    """A `ClusterAccess` with static credentials."""

    refresh_due = False
    expired = False

    def __init__(self, config: StaticConfig, previous: ClusterAccess | None = None) -> None:
        """Reuse the connections of `previous`, the access used so far, if nothing but the token has changed.

        Raises `ClientError` if a certificate or key is not usable.
        """
        self._config = config
        self.server = config.server
        self.rotates = config.rotates
        self.auth_headers = {"Authorization": f"Bearer {config.token}"} if config.token else {}
        self.pool: Any
        if isinstance(previous, StaticAccess) and _connection_settings(previous._config) == _connection_settings(
            config
        ):
            self.pool = previous.pool
        else:
            self.pool = _make_pool(config)

    def refresh(self) -> None:
        """Do nothing: static credentials change only when they are reloaded."""


def find_static_config(
    kubeconfig: str | None, server: str | None, environment: Mapping[str, str], *, first: bool = True
) -> StaticConfig | None:
    """Return how to reach the API server, or None if that takes more than static credentials.

    Without a `kubeconfig`, that is the Pod's service account, or no credentials if there is a `server`. A `server`
    overrides the kubeconfig's URL. The result is None for a kubeconfig that cannot be read, is malformed or has a field
    not handled here (such as `exec`), and for a server behind a proxy, including one that `environment` sets.
    Environment variables are read from `environment`, not from the process. `first`: see `read_token`.

    Raises `ClientError` if a referenced file cannot be read, the token is not usable, or `check_entries` rejects the
    kubeconfig.
    """
    if kubeconfig is not None:
        config = _from_kubeconfig(kubeconfig, server, environment, first)
    else:
        config = StaticConfig("server", server) if server else _from_service_account(environment)
    return None if config is None or http_proxy_for(config.server, environment) else config


def check_server(server: str, source: str | None) -> None:
    """Raise `ClientError` unless `server` is an HTTP URL. `source` is the file it was read from, if any."""
    subject = f"{source}: server" if source else "server"
    try:
        parts = urlsplit(server)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ClientError(f"{subject}: must be a URL such as https://10.0.0.1:6443, not {server!r}")


def check_entries(cluster: Mapping[str, Any], user: Mapping[str, Any], source: str) -> None:
    """Raise `ClientError` for kubeconfig settings that must not be ignored. `source` is the file.

    Ignoring impersonation would grant the permissions of the more powerful user. A certificate authority together with
    `insecure-skip-tls-verify` is ambiguous; kubectl rejects it too.
    """
    if used := [name for name in _IMPERSONATION if user.get(name)]:
        raise ClientError(f"{source}: user: {', '.join(used)}: impersonation is not supported")
    authority = next((name for name in _AUTHORITY if cluster.get(name)), "")
    if authority and cluster.get("insecure-skip-tls-verify"):
        raise ClientError(f"{source}: cluster: {authority} and insecure-skip-tls-verify are mutually exclusive")


def read_token(user: Mapping[str, Any], folder: Path, source: str, *, first: bool) -> str:
    """Return the token of a kubeconfig's `user`, or "" if it has none.

    `tokenFile`, which is relative to `folder`, takes precedence over `token`. If the file is not usable, fall back to
    `token`, but only on the `first` load: on a reload, the file's previous token is the better choice.
    Raises `ClientError`, whose message begins with `source`.
    """
    token, name = str(user.get("token") or ""), user.get("tokenFile")
    if name:
        path = folder / name
        try:
            return usable_token(read_file(source, path), f"{source}: {path}")
        except ClientError as error:
            if not (first and token):
                raise
            log.warning("%s; using the kubeconfig's token instead", error)
    return usable_token(token, f"{source}: token") if token else ""


def usable_token(token: str | bytes, source: str) -> str:
    """Return a token without leading and trailing white space.

    Raises `ClientError` if the token is empty or contains characters other than visible ASCII, which are not valid in
    the header (RFC 9110, section 5.5). The message begins with `source` and does not quote the token.
    """
    text = (token if isinstance(token, str) else token.decode(errors="replace")).strip()
    if not text:
        raise ClientError(f"{source}: the token is empty")
    if not all("!" <= character <= "~" for character in text):
        raise ClientError(f"{source}: the token contains characters other than visible ASCII")
    return text


def read_file(source: str, path: Path) -> bytes:
    """Return the content of a file. Raises `ClientError`, whose message begins with `source`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(f"{source}: {path}: {error.strerror}") from None


def expand_home(path: str, environment: Mapping[str, str]) -> Path:
    """Expand a leading `~` to `HOME`, or without that to the process user's home, and `~USER` to that user's home."""
    if path != "~" and not path.startswith("~/"):
        return Path(os.path.expanduser(path))  # for `~USER`, this reads the user database only
    if "HOME" in environment:
        return Path(environment["HOME"], path[2:])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir, path[2:])
    except KeyError:
        return Path(path)


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


def _from_kubeconfig(path: str, server: str | None, environment: Mapping[str, str], first: bool) -> StaticConfig | None:
    import yaml

    file = expand_home(path, environment)
    try:
        content = yaml.safe_load(file.read_bytes())
        context = _named(content["contexts"], content["current-context"], "context")
        cluster = _named(content["clusters"], context["cluster"], "cluster")
        user = _named(content["users"], context["user"], "user") if context.get("user") else {}
    except (OSError, yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if not _is_static(cluster, _STATIC_CLUSTER_FIELDS) or not _is_static(user, _STATIC_USER_FIELDS):
        return None
    if not (server or cluster.get("server")):
        return None
    check_entries(cluster, user, path)
    reader = _PemReader(path, file.parent)
    return StaticConfig(
        path,
        server or cluster["server"],
        read_token(user, file.parent, path, first=first),
        rotates=any(user.get(name) or cluster.get(name) for name in _FILE_FIELDS),
        authority=reader.read(cluster, "certificate-authority"),
        certificate=reader.read(user, "client-certificate"),
        key=reader.read(user, "client-key"),
        insecure=cluster.get("insecure-skip-tls-verify") is True,
        server_name=cluster.get("tls-server-name") or "",
    )


def _named(entries: Any, name: str, kind: str) -> Any:
    (match,) = (entry[kind] or {} for entry in entries if entry["name"] == name)
    return match


def _is_static(fields: Any, known: set[str]) -> bool:
    if not isinstance(fields, dict) or not fields.keys() <= known:
        return False
    types = {"insecure-skip-tls-verify": bool, "extensions": object}
    return all(isinstance(value, types.get(name, str)) for name, value in fields.items())


class _PemReader:
    """Reads the certificates and keys of a kubeconfig, whose paths are relative to the kubeconfig's `folder`."""

    def __init__(self, kubeconfig: str, folder: Path) -> None:
        self._kubeconfig = kubeconfig
        self._folder = folder

    def read(self, fields: Mapping[str, Any], name: str) -> PemData | None:
        """Return the decoded field `NAME-data`, or else the content of the file in field `NAME`, or else None.

        Raises `ClientError`.
        """
        if encoded := fields.get(f"{name}-data"):
            try:
                return PemData(base64.b64decode("".join(encoded.split()), validate=True), f"{name}-data")
            except (binascii.Error, ValueError) as error:
                raise ClientError(f"{self._kubeconfig}: {name}-data: not valid base64: {error}") from None
        if not fields.get(name):
            return None
        path = self._folder / fields[name]
        return PemData(read_file(self._kubeconfig, path), str(path))


def _connection_settings(config: StaticConfig) -> tuple[object, ...]:
    return (config.server, config.authority, config.certificate, config.key, config.insecure, config.server_name)


def _make_pool(config: StaticConfig) -> Any:
    import urllib3

    if config.insecure:  # the user chose this; a warning for each request would be noise
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    name: dict[str, Any] = {"server_hostname": config.server_name} if config.server_name else {}
    return urllib3.PoolManager(ssl_context=_tls_context(config), maxsize=CONNECTIONS, socket_options=KEEPALIVE, **name)


def _tls_context(config: StaticConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust an intermediate authority alone, as Go and curl do
    if config.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif config.authority is None:
        context.load_default_certs()
    if config.authority is not None:
        try:
            context.load_verify_locations(cadata=config.authority.content.decode("ascii", errors="ignore"))
        except (ssl.SSLError, ValueError) as error:
            raise ClientError(
                f"{config.source}: certificate authority {config.authority.source}: {_reason(error)}"
            ) from None
    if config.certificate is not None:
        key = config.key or config.certificate  # one file may contain both
        try:
            _load_key_pair(context, config.certificate.content, key.content)
        except (OSError, ValueError) as error:
            raise ClientError(
                f"{config.source}: client certificate {config.certificate.source}, key {key.source}: {_reason(error)}"
            ) from None
    return context


def _load_key_pair(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Load a client certificate and its key.

    Python reads these from files only. Anonymous files in memory keep the key off the disk.
    """
    files = [os.memfd_create("kproxy-credentials"), os.memfd_create("kproxy-credentials")]
    try:
        for file, content in zip(files, (certificate, key), strict=True):
            os.write(file, content)
        certificate_path, key_path = (f"/proc/self/fd/{file}" for file in files)
        # With a password callback, an encrypted key is an error instead of a prompt on the terminal.
        context.load_cert_chain(certificate_path, key_path, lambda: "")
    finally:
        for file in files:
            os.close(file)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
