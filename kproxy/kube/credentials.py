"""Where the API server is and how it knows us: kubeconfigs and service accounts, read by the `kubernetes` package.

The package is imported when something is loaded, not with this module.
"""
# ruff: noqa: PLC0415 - kubernetes and urllib3 cost tens of megabytes, and only those who have a client need them

from __future__ import annotations

import logging
import socket
import ssl
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

_KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]  # a peer that vanished is found within a minute


class ClientError(Exception):
    """The configuration or the credentials cannot be used; the message is one line: which file, what, why."""


def load_configuration(kubeconfig: str | None, server: str | None) -> Any:
    """Return the package's Configuration for a kubeconfig file, or for the Pod's service account if there is none.

    `server` overrides the URL in it; alone it needs no credentials. Raises `ClientError`.
    """
    from kubernetes import config
    from kubernetes.client.configuration import Configuration

    configuration = Configuration()
    configuration.socket_options = _KEEPALIVE
    configuration.connection_pool_maxsize = 4
    if kubeconfig is not None:
        for path in kubeconfig.split(":"):
            with Explained(path), Path(path).expanduser().open("rb"):
                pass  # the package passes over files that are not there
        with Explained(kubeconfig):
            config.load_kube_config(kubeconfig, client_configuration=configuration, persist_config=False)
    elif server is None:
        with Explained("in-cluster service account"):
            config.load_incluster_config(client_configuration=configuration)
    if server:
        configuration.host = server
    _check_certificates(configuration, kubeconfig or "in-cluster service account")
    return configuration


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


def _check_certificates(configuration: Any, source: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if configuration.ssl_ca_cert:
        with Explained(f"{source}: certificate authority {configuration.ssl_ca_cert}"):
            context.load_verify_locations(configuration.ssl_ca_cert)
    if configuration.cert_file:
        with Explained(f"{source}: client certificate {configuration.cert_file}, key {configuration.key_file}"):
            # A password callback, so that an encrypted key is an error and no question on the terminal.
            context.load_cert_chain(configuration.cert_file, configuration.key_file, lambda: "")


def make_pool(configuration: Any) -> Any:
    """Return the connections for a Configuration. Raises `ClientError`."""
    import urllib3
    from kubernetes.client.rest import RESTClientObject

    if not configuration.verify_ssl:  # asked for in so many words: no warning per request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with Explained("connection settings"):
        return RESTClientObject(configuration).pool_manager


def names_token_file(kubeconfig: str | None) -> bool:
    """Tell whether a user of a kubeconfig has its token in a file of its own."""
    if kubeconfig is None:
        return False
    for path in kubeconfig.split(":"):
        content = yaml.safe_load(Path(path).expanduser().read_bytes())
        users = content.get("users") or [] if isinstance(content, dict) else []
        if any("tokenFile" in (user.get("user") or {}) for user in users):
            return True
    return False


class Explained:
    """Turns whatever goes wrong inside into a `ClientError` that names the source, on one line.

    The package reports a failed exec plugin only to the root logger and goes on without credentials: records
    of this thread there count as errors as well.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._said: list[str] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        logging.getLogger().addFilter(self._hear)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        from kubernetes.config import ConfigException

        logging.getLogger().removeFilter(self._hear)
        expected = (ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError)
        if isinstance(error, expected):
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        elif error is None and self._said:
            text = "; ".join(self._said)
        else:
            return
        raise ClientError(f"{self._source}: {' '.join(text.split())}") from None

    def _hear(self, record: logging.LogRecord) -> bool:
        ours = record.thread == self._thread and record.levelno >= logging.ERROR
        if ours:
            self._said.append(record.getMessage())
        return not ours
