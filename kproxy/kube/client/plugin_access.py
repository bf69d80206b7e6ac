"""Access to the API server with exec plugins, auth providers and proxies, through the `kubernetes` package.

Importing this module does not import the package. Creating a `PluginAccess` does.
"""
# ruff: noqa: PLC0415 - the kubernetes package takes 20 MB of memory; it is imported only when needed

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

_FILE_FIELDS = ("tokenFile", "certificate-authority", "client-certificate", "client-key")
_PLUGIN_FIELDS = {"exec", "auth-provider"}
"""Fields of a kubeconfig user whose credentials come from a program or from another server."""


class PluginAccess:
    """A `ClusterAccess` that the `kubernetes` package loads from a kubeconfig or from the Pod's service account.

    The URL `server` overrides the kubeconfig's. If there is a `server` but no kubeconfig, no credentials are used.
    Creating the object may run an exec plugin. See `read_token` for `first`. Raises `ClientError`.
    """

    def __init__(self, kubeconfig: str | None, server: str | None, *, first: bool = True) -> None:
        from kubernetes import config
        from kubernetes.client.configuration import Configuration

        self._source = kubeconfig or IN_CLUSTER
        self._configuration = configuration = Configuration()
        configuration.socket_options = KEEPALIVE
        configuration.connection_pool_maxsize = CONNECTIONS
        # Ignore the proxy that the package chose by its own rules: `_choose_proxy` applies Go's rules.
        configuration.proxy, configuration.no_proxy = None, ""
        self._loader: Any = None
        self._plugin_files: dict[str, bytes | None] | None = None
        # True if credentials come from files. ApiClient then reloads them, and keeps the current ones if that fails.
        # The package itself refreshes tokens from plugins.
        self.rotates = kubeconfig is None and server is None
        if kubeconfig is not None:
            self._loader, self.rotates, has_plugin = _load_kubeconfig(configuration, kubeconfig, first)
            if has_plugin:  # before the files are used: if they are replaced meanwhile, the difference is found later
                self._plugin_files = _contents(configuration)
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
    def files_changed(self) -> bool:
        """Whether files may have been replaced. With a plugin, they are compared, so that it does not run in vain."""
        return self._plugin_files is None or self._plugin_files != _contents(self._configuration)

    @property
    def refresh_due(self) -> bool:
        """Whether the package considers the token expired. It does so starting five minutes before the expiry time."""
        from kubernetes.config.kube_config import EXPIRY_SKEW_PREVENTION_DELAY

        return self._expires_within(EXPIRY_SKEW_PREVENTION_DELAY)

    @property
    def expired(self) -> bool:
        """Whether the token has expired."""
        return self._expires_within(timedelta())

    def refresh(self) -> None:
        """Let the package get a new token if it considers the current token expired. See `ClusterAccess.refresh`."""
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
        # Set the headers first: a thread that reads the new expiry time must also get the new headers.
        self.auth_headers = headers
        self._expiry = getattr(self._loader, "expiry", None) if self._refresh_hook else None

    def _header(self, value: str) -> str:
        scheme, _, token = value.partition(" ")
        return f"{scheme} {usable_token(token, f'{self._source}: credentials')}"


def _load_kubeconfig(configuration: Any, kubeconfig: str, first: bool) -> tuple[Any, bool, bool]:
    """Load a kubeconfig into the package's configuration.

    Return the package's loader, whether credentials or certificates come from files, and whether credentials come from
    a plugin.
    """
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    for path in kubeconfig.split(":"):
        with PackageErrors(path), expand_home(path, os.environ).open("rb"):
            pass  # the package would ignore a missing file
    with PackageErrors(kubeconfig):
        merged = KubeConfigMerger(kubeconfig).config
        for kind in ("clusters", "contexts", "users"):
            for entry in merged.value[kind]:
                entry.name = f"{entry.path}: {kind}"  # used in error messages; the default name includes credentials
        # config_base_path=None: paths are relative to the kubeconfig file that contains them.
        loader = KubeConfigLoader(merged, config_base_path=None)
        context = merged["contexts"].get_with_name(merged["current-context"])["context"]
        cluster = merged["clusters"].get_with_name(context["cluster"]).value["cluster"]
        user, folder = _find_user(merged, context)
        check_entries(cluster, user, kubeconfig)
        has_files = any(user.get(name) or cluster.get(name) for name in _FILE_FIELDS)
        token = read_token(user, folder, kubeconfig, first=first)
        # Give the package only the token that `read_token` chose: by itself, the package would prefer `token` to
        # `tokenFile`, even if `token` is empty.
        user.pop("tokenFile", None)
        if token:
            user["token"] = token
        loader.load_and_set(configuration)
    return loader, has_files, bool(user.keys() & _PLUGIN_FIELDS)


def _contents(configuration: Any) -> dict[str, bytes | None]:
    """Return the contents of the files with certificates and keys, None for those that cannot be read."""
    paths = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
    return {path: _content(Path(path)) for path in paths if path}


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _find_user(merged: Any, context: Any) -> tuple[dict[str, Any], Path]:
    """Return the fields of the context's user, and the folder to which paths in these fields are relative.

    If the context names no user, there are no fields. If the user does not exist, raise `LookupError`, because the
    server would reject every request without credentials.
    """
    name, users = context.safe_get("user"), merged.safe_get("users")
    if not name:
        return {}, Path()
    entry = merged["users"].get_with_name(name, safe=True) if users else None
    if entry is None:
        raise LookupError(f"the current context refers to user {name!r}, which does not exist")
    return entry.value["user"], Path(entry.path).parent


def _choose_proxy(configuration: Any, source: str) -> None:
    """Set the proxy to the kubeconfig's, or to that of the environment if the kubeconfig has none.

    The kubeconfig's proxy is used even for servers that `NO_PROXY` lists. Raises `ClientError`.
    """
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
    if not configuration.verify_ssl:  # the user chose this: do not warn about it on each request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with PackageErrors("connection settings"):
        pool = RESTClientObject(configuration).pool_manager
    # The context already contains the client certificate. Loading it again while other threads connect is not safe.
    pool.connection_pool_kw |= {"ssl_context": context, "cert_file": None, "key_file": None}
    return pool


def _tls_context(configuration: Any, source: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Like Go and curl, accept an intermediate CA as a trust anchor.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
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
            # Without a password callback, OpenSSL would prompt on the terminal for the password of an encrypted key.
            context.load_cert_chain(configuration.cert_file, configuration.key_file, lambda: "")
    return context


class PackageErrors:
    """A context manager that converts exceptions to a `ClientError`. Its message is one line and begins with `source`.

    If an exec plugin fails, the package does not raise an exception. It logs an error to the root logger and continues
    without credentials. Therefore, an error that the current thread logs to the root logger also becomes a
    `ClientError`; it is not logged.
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
