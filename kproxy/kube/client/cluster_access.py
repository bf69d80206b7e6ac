"""Access to the API server with static credentials: server URL, TLS settings, connections, authentication headers."""
# ruff: noqa: PLC0415 - urllib3 and PyYAML take megabytes of memory; they are imported only when needed

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
"""Socket options: TCP_NODELAY (urllib3's default), and keepalive probes that detect a dead peer within a minute."""
CONNECTIONS = 8
"""Maximum number of idle connections to keep.

This is more than the number of threads that share a client (one for each kind of object, and one for events). With
fewer, urllib3 would have to discard connections, and it logs a warning when it does.
"""
IN_CLUSTER = "in-cluster service account"
"""The name of the Pod's service account in messages. Messages about other credentials contain the kubeconfig's path."""
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

    The message is one line. It says what is wrong, and in which file and field.
    """


class ClusterAccess(Protocol):
    """How to reach one API server and authenticate to it."""

    @property
    def server(self) -> str:
        """The server's URL."""

    @property
    def rotates(self) -> bool:
        """Whether to reload credentials and certificates regularly, because their files may be replaced."""

    @property
    def files_changed(self) -> bool:
        """Whether a reload may find anything new. This may read files."""

    @property
    def pool(self) -> Any:
        """The connections to the server, as a `urllib3.PoolManager`."""

    @property
    def auth_headers(self) -> Mapping[str, str]:
        """The request headers that authenticate the client. `refresh` may replace the mapping, but never alters it."""

    @property
    def refresh_due(self) -> bool:
        """Whether to call `refresh` before the next request, because the token has expired or is about to expire."""

    @property
    def expired(self) -> bool:
        """Whether the token has expired."""

    def refresh(self) -> None:
        """Get a new token. Raises `ClientError`.

        This may run a program or send requests, which can take arbitrarily long. Only one thread may call this method
        at a time. Other threads may read the properties meanwhile.
        """


class PemData(Struct, frozen=True):
    """The PEM text of certificates or of a key. `source` is the file or field that contains the text."""

    content: bytes
    source: str


class StaticConfig(Struct, frozen=True):
    """The address of an API server, the TLS settings, and static credentials.

    `source` says in messages where the configuration comes from; for a kubeconfig, it is the path. `authority` contains
    the trusted certificate authorities; if it is None, those of the system are trusted. If `insecure` is true, the
    server's certificate is not verified. `server_name` is the name that the server's certificate must contain; if it is
    "", the certificate must contain the host in the URL. For `rotates`, see `ClusterAccess.rotates`.
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

    files_changed = True
    refresh_due = False
    expired = False

    def __init__(self, config: StaticConfig, previous: ClusterAccess | None = None) -> None:
        """Prepare the connections and headers.

        `previous` is the access that was used until now. Its connections are reused unless the server's URL, the TLS
        settings or the client certificate have changed. Raises `ClientError` if a certificate or key is not usable.
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
    """Return how to reach the API server with static credentials, or None if `plugin_access.PluginAccess` must be used.

    Without a `kubeconfig`, use the Pod's service account, or no credentials if a `server` is given. With a
    `kubeconfig`, `server` overrides its URL. The result is None in these cases:

    - The kubeconfig cannot be read or is malformed, or there is no server URL; `PluginAccess` reports the error.
    - The kubeconfig has a field that is not supported by this function, such as `exec` or `proxy-url`.
    - The variables in `environment` require a proxy for the server.

    Environment variables are read from `environment`, not from the process. For `first`, see `read_token`.

    Raises `ClientError` if a referenced file cannot be read, if the token or a base64 value is invalid, if
    `check_entries` rejects the kubeconfig, or if the Pod's environment does not contain the API server's address.
    """
    if kubeconfig is not None:
        config = _from_kubeconfig(kubeconfig, server, environment, first)
    else:
        config = StaticConfig("server", server) if server else _from_service_account(environment)
    return None if config is None or http_proxy_for(config.server, environment) else config


def check_server(server: str, source: str | None) -> None:
    """Raise `ClientError` unless `server` is an HTTP or HTTPS URL. `source` is the file that contains it, if any."""
    subject = f"{source}: server" if source else "server"
    try:
        parts = urlsplit(server)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ClientError(f"{subject}: must be a URL such as https://10.0.0.1:6443, not {server!r}")


def check_entries(cluster: Mapping[str, Any], user: Mapping[str, Any], source: str) -> None:
    """Raise `ClientError` for kubeconfig settings that must not be ignored. `source` is the file's path.

    If impersonation were ignored, kproxy would act with the permissions of the kubeconfig's user, which usually exceed
    those of the impersonated user. A certificate authority together with `insecure-skip-tls-verify` is ambiguous;
    kubectl rejects this combination too.
    """
    if used := [name for name in _IMPERSONATION if user.get(name)]:
        raise ClientError(f"{source}: user: {', '.join(used)}: impersonation is not supported")
    authority = next((name for name in _AUTHORITY if cluster.get(name)), "")
    if authority and cluster.get("insecure-skip-tls-verify"):
        raise ClientError(f"{source}: cluster: {authority} and insecure-skip-tls-verify are mutually exclusive")


def read_token(user: Mapping[str, Any], folder: Path, source: str, *, first: bool) -> str:
    """Return the token of a kubeconfig's `user`, or "" if it has none.

    The path in `tokenFile` is relative to `folder`. `tokenFile` takes precedence over `token`. If the file is not
    usable when credentials are loaded for the `first` time, `token` is used instead. If the file is not usable on a
    reload, the function raises `ClientError`, so that the caller keeps the token that it read earlier.

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

    Raises `ClientError` if the token is empty or contains a character that is not visible ASCII and therefore not valid
    in the header (RFC 9110, section 5.5). The message begins with `source` and does not quote the token.
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
    """Expand a leading `~` or `~USER` in a path to a home directory.

    `~` is the value of `HOME` in `environment`, or the home directory of the process's user if `HOME` is not set.
    `~USER` is the home directory of that user. A path whose home directory is unknown is returned unchanged.
    """
    if path != "~" and not path.startswith("~/"):
        return Path(os.path.expanduser(path))  # for `~USER`, this reads only the user database
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
    """Reads the certificates and keys of a kubeconfig. Paths in the kubeconfig are relative to `folder`."""

    def __init__(self, kubeconfig: str, folder: Path) -> None:
        self._kubeconfig = kubeconfig
        self._folder = folder

    def read(self, fields: Mapping[str, Any], name: str) -> PemData | None:
        """Return the PEM data of a kubeconfig field, or None if there is none.

        The field `NAME-data` contains the data in base64. If it is missing, the field `NAME` contains the path of a
        file with the data. Raises `ClientError`.
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

    if config.insecure:  # the user chose this: do not warn about it on each request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    name: dict[str, Any] = {"server_hostname": config.server_name} if config.server_name else {}
    return urllib3.PoolManager(ssl_context=_tls_context(config), maxsize=CONNECTIONS, socket_options=KEEPALIVE, **name)


def _tls_context(config: StaticConfig) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Like Go and curl, accept an intermediate CA as a trust anchor.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if config.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif config.authority is None and not config.server.lower().startswith("http://"):
        context.load_default_certs()  # 2 MB of memory, so not for plain HTTP; redirects are not followed
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

    Python can read these only from files. Anonymous files in memory are used, so that the key is not written to disk.
    """
    files = [os.memfd_create("kproxy-credentials"), os.memfd_create("kproxy-credentials")]
    try:
        for file, content in zip(files, (certificate, key), strict=True):
            os.write(file, content)
        certificate_path, key_path = (f"/proc/self/fd/{file}" for file in files)
        # Without a password callback, OpenSSL would prompt on the terminal for the password of an encrypted key.
        context.load_cert_chain(certificate_path, key_path, lambda: "")
    finally:
        for file in files:
            os.close(file)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
