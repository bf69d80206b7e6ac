"""Access to the API server with exec plugins, auth providers and proxies, through the `kubernetes` package.

The package is imported when a `PluginAccess` is created, not with this module.
"""
# ruff: noqa: PLC0415 - the kubernetes package takes 20 MB of memory; only credentials that need it load it

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kproxy.kube.client.cluster_access import (
    CONNECTIONS,
    IN_CLUSTER,
    KEEPALIVE,
    ClientError,
    check_entries,
    expand_home,
    read_token,
    usable_token,
)
from kproxy.kube.client.http_proxy import http_proxy_for

_FILE_FIELDS = ("tokenFile", "client-certificate", "client-key")
_PLUGIN_FIELDS = {"exec", "auth-provider"}
"""Fields of a user whose credentials may come from a program or another server."""


class PluginAccess:
    """A `ClusterAccess` that the `kubernetes` package loads from a kubeconfig or from the Pod's service account.

    `server` overrides the kubeconfig's URL; without a kubeconfig, it is accessed without credentials. Loading may run
    an exec plugin. `first`: see `read_token`. Raises `ClientError`.
    """

    def __init__(self, kubeconfig: str | None, server: str | None, *, first: bool = True) -> None:
        from kubernetes import config
        from kubernetes.client.configuration import Configuration

        self._source = kubeconfig or IN_CLUSTER
        self._configuration = configuration = Configuration()
        configuration.socket_options = KEEPALIVE
        configuration.connection_pool_maxsize = CONNECTIONS
        # The package has its own rules for proxies in the environment; `_choose_proxy` applies Go's.
        configuration.proxy, configuration.no_proxy = None, ""
        self._loader: Any = None
        # The package refreshes tokens of plugins. Credentials in files are reloaded by ApiClient, which keeps the
        # current ones if that fails.
        self.rotates = kubeconfig is None and server is None
        if kubeconfig is not None:
            self._loader, self.rotates = _load_kubeconfig(configuration, kubeconfig, first)
        elif server is None:
            with PackageErrors(IN_CLUSTER):
                config.load_incluster_config(configuration, try_refresh_token=False)
        if server:
            configuration.host = server
        self.server: str = configuration.host
        _choose_proxy(configuration, self._source)
        self._refresh_hook = configuration.refresh_api_key_hook
        self.auth_headers: Mapping[str, str]
        self._expiry: datetime | None
        self._adopt_credentials()
        self.pool = _make_pool(configuration, self._source)

    @property
    def refresh_due(self) -> bool:
        """Whether the package considers the token expired, which it does five minutes early."""
        from kubernetes.config.kube_config import EXPIRY_SKEW_PREVENTION_DELAY

        return self._expires_within(EXPIRY_SKEW_PREVENTION_DELAY)

    @property
    def expired(self) -> bool:
        """Whether the token has expired."""
        return self._expires_within(timedelta())

    def refresh(self) -> None:
        """Let the package get a new token if it considers the current one expired. See `ClusterAccess`."""
        with PackageErrors(self._source):
            self._refresh_hook(self._configuration)
        self._adopt_credentials()

    def _expires_within(self, period: timedelta) -> bool:
        return self._expiry is not None and self._expiry - period <= datetime.now(UTC)

    def _adopt_credentials(self) -> None:
        """Read the headers and the expiry time from the package."""
        self._configuration.refresh_api_key_hook = None  # the hook may run a plugin; only `refresh` calls it
        with PackageErrors(self._source):
            settings = self._configuration.auth_settings()
        headers = {item["key"].title(): self._header(item["value"]) for item in settings.values() if item.get("value")}
        # Set the headers first: other threads wait for the refresh until the expiry time is updated as well.
        self.auth_headers = headers
        self._expiry = getattr(self._loader, "expiry", None) if self._refresh_hook else None

    def _header(self, value: str) -> str:
        scheme, _, token = value.partition(" ")
        return f"{scheme} {usable_token(token, f'{self._source}: credentials')}"


def _load_kubeconfig(configuration: Any, kubeconfig: str, first: bool) -> tuple[Any, bool]:
    """Fill the package's configuration. Return its loader, and whether the credentials come from files that rotate."""
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    for path in kubeconfig.split(":"):
        with PackageErrors(path), expand_home(path, os.environ).open("rb"):
            pass  # the package ignores missing files
    with PackageErrors(kubeconfig):
        merged = KubeConfigMerger(kubeconfig).config
        for kind in ("clusters", "contexts", "users"):
            for entry in merged.value[kind]:
                entry.name = f"{entry.path}: {kind}"  # part of the package's errors; its own name quotes credentials
        loader = KubeConfigLoader(merged, config_base_path=None)  # None: paths are relative to the file they are in
        context = merged["contexts"].get_with_name(merged["current-context"])["context"]
        cluster = merged["clusters"].get_with_name(context["cluster"]).value["cluster"]
        user, folder = _find_user(merged, context)
        check_entries(cluster, user, kubeconfig)
        has_files = any(user.get(name) for name in _FILE_FIELDS)
        token = read_token(user, folder, kubeconfig, first=first)
        user.pop("tokenFile", None)  # the package prefers the token, even an empty one
        if token:
            user["token"] = token
        loader.load_and_set(configuration)
    return loader, has_files and not user.keys() & _PLUGIN_FIELDS


def _find_user(merged: Any, context: Any) -> tuple[dict[str, Any], Path]:
    """Return the fields of the context's user, if it names one, and the folder that their paths are relative to.

    Raises `LookupError` for a user that does not exist: without credentials, the server would reject every request.
    """
    name, users = context.safe_get("user"), merged.safe_get("users")
    if not name:
        return {}, Path()
    entry = merged["users"].get_with_name(name, safe=True) if users else None
    if entry is None:
        raise LookupError(f"the current context refers to user {name!r}, which does not exist")
    return entry.value["user"], Path(entry.path).parent


def _choose_proxy(configuration: Any, source: str) -> None:
    """Set the proxy: the kubeconfig's, regardless of `NO_PROXY`, or else the environment's. Raises `ClientError`."""
    if not configuration.proxy:
        configuration.proxy = http_proxy_for(configuration.host, os.environ) or None
    if not configuration.proxy:
        return
    with PackageErrors(f"{source}: proxy"):
        proxy = urlsplit(configuration.proxy)
    if proxy.scheme.lower().startswith("socks"):
        if find_spec("socks") is None:
            raise ClientError(f"{source}: a SOCKS proxy requires the Python package PySocks, which is not installed")
    elif proxy.username is not None:
        from urllib3 import make_headers

        credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        configuration.proxy_headers = make_headers(proxy_basic_auth=credentials)


def _make_pool(configuration: Any, source: str) -> Any:
    import urllib3
    from kubernetes.client.rest import RESTClientObject

    context = _tls_context(configuration, source)
    if not configuration.verify_ssl:  # the user chose this; a warning for each request would be noise
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with PackageErrors("connection settings"):
        pool = RESTClientObject(configuration).pool_manager
    # The context has the client certificate already; loading it again while other threads connect is not safe.
    pool.connection_pool_kw |= {"ssl_context": context, "cert_file": None, "key_file": None}
    return pool


def _tls_context(configuration: Any, source: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust an intermediate authority alone, as Go and curl do
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.ssl_ca_cert:
        with PackageErrors(f"{source}: certificate authority {configuration.ssl_ca_cert}"):
            context.load_verify_locations(configuration.ssl_ca_cert)
    else:
        context.load_default_certs()
    if configuration.cert_file:
        with PackageErrors(f"{source}: client certificate {configuration.cert_file}, key {configuration.key_file}"):
            # With a password callback, an encrypted key is an error instead of a prompt on the terminal.
            context.load_cert_chain(configuration.cert_file, configuration.key_file, lambda: "")
    return context


class PackageErrors:
    """A context manager that converts exceptions to a one-line `ClientError` that begins with the source.

    The package reports a failed exec plugin only to the root logger, and continues without credentials. Therefore, an
    error that the current thread logs there also becomes a `ClientError`.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._logged: list[str] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> None:
        logging.getLogger().addFilter(self._capture)

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        from kubernetes.config import ConfigException
        from yaml import YAMLError

        logging.getLogger().removeFilter(self._capture)
        expected = (ConfigException, OSError, YAMLError, ValueError, TypeError, LookupError, AttributeError)
        if isinstance(error, expected):
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        elif error is None and self._logged:
            text = "; ".join(self._logged)
        else:
            return
        raise ClientError(f"{self._source}: {' '.join(text.split())}") from None

    def _capture(self, record: logging.LogRecord) -> bool:
        captured = record.thread == self._thread and record.levelno >= logging.ERROR
        if captured:
            self._logged.append(record.getMessage())
        return not captured
