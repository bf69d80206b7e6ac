"""Every other way to the API server: exec plugins, identity providers, proxies, read by the `kubernetes` package.

The package is imported when something is loaded, not with this module.
"""
# ruff: noqa: PLC0415 - kubernetes costs 20 MB, and only those who cannot do without need it

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import yaml

from kproxy.kube.access import CONNECTIONS, IN_CLUSTER, KEEPALIVE, ClientError


class PackageAccess:
    """A way to the server (`kproxy.kube.access.Access`) by a kubeconfig, or by a Pod's service account without one.

    `server` overrides the URL in it; alone it needs no credentials. Raises `ClientError`.
    """

    def __init__(self, kubeconfig: str | None, server: str | None) -> None:
        self._source = kubeconfig or IN_CLUSTER
        self._configuration = _load_configuration(kubeconfig, server)
        self.server: str = server or self._configuration.host
        with Explained(self._source):
            # The package refreshes a service account's token and an exec plugin's, but not this.
            self.rotates = _names_token_file(kubeconfig)
        self.pool = _make_pool(self._configuration)

    def authentication(self) -> dict[str, str]:
        """Return the headers by which the server knows us, with a token that the package may refresh for that."""
        with Explained(self._source):
            settings = self._configuration.auth_settings()
        return {item["key"].title(): item["value"].strip() for item in settings.values() if item.get("value")}


def _load_configuration(kubeconfig: str | None, server: str | None) -> Any:
    from kubernetes import config
    from kubernetes.client.configuration import Configuration

    configuration = Configuration()
    configuration.socket_options = KEEPALIVE
    configuration.connection_pool_maxsize = CONNECTIONS
    if kubeconfig is not None:
        for path in kubeconfig.split(":"):
            with Explained(path), Path(path).expanduser().open("rb"):
                pass  # the package passes over files that are not there
        with Explained(kubeconfig):
            config.load_kube_config(kubeconfig, client_configuration=configuration, persist_config=False)
    elif server is None:
        with Explained(IN_CLUSTER):
            config.load_incluster_config(client_configuration=configuration)
    if server:
        configuration.host = server
    _check_certificates(configuration, kubeconfig or IN_CLUSTER)
    return configuration


def _check_certificates(configuration: Any, source: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if configuration.ssl_ca_cert:
        with Explained(f"{source}: certificate authority {configuration.ssl_ca_cert}"):
            context.load_verify_locations(configuration.ssl_ca_cert)
    if configuration.cert_file:
        with Explained(f"{source}: client certificate {configuration.cert_file}, key {configuration.key_file}"):
            # A password callback, so that an encrypted key is an error and no question on the terminal.
            context.load_cert_chain(configuration.cert_file, configuration.key_file, lambda: "")


def _make_pool(configuration: Any) -> Any:
    import urllib3
    from kubernetes.client.rest import RESTClientObject

    if not configuration.verify_ssl:  # asked for in so many words: no warning per request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with Explained("connection settings"):
        return RESTClientObject(configuration).pool_manager


def _names_token_file(kubeconfig: str | None) -> bool:
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
