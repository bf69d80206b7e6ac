"""Every other way to the API server: exec plugins, identity providers, proxies, read by the `kubernetes` package.

The package is imported when something is loaded, not with this module.
"""
# ruff: noqa: PLC0415 - kubernetes costs 20 MB, and only those who cannot do without need it

from __future__ import annotations

import logging
import os
import ssl
import threading
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
    read_token,
    usable_token,
)
from kproxy.kube.client.http_proxy import http_proxy_for

_FILES = ("tokenFile", "client-certificate", "client-key")
_RUNS = {"exec", "auth-provider"}
"""Fields of users whose credentials are not for the asking every minute."""


class PluginAccess:
    """A way to the server (`kproxy.kube.client.cluster_access.ClusterAccess`) by a kubeconfig or a service account.

    Without a kubeconfig, it is that of the Pod.
    `server` overrides the URL in it; alone it needs no credentials. `first`: see `read_token`. Raises `ClientError`.
    """

    def __init__(self, kubeconfig: str | None, server: str | None, *, first: bool = True) -> None:
        from kubernetes import config
        from kubernetes.client.configuration import Configuration

        self._source = kubeconfig or IN_CLUSTER
        self._configuration = configuration = Configuration()
        configuration.socket_options = KEEPALIVE
        configuration.connection_pool_maxsize = CONNECTIONS
        # The package has a rule of its own for proxies of the environment; ours is Go's.
        configuration.proxy, configuration.no_proxy = None, ""
        # The package refreshes an exec plugin's token; files are read again by whoever keeps what they held before.
        self.rotates = kubeconfig is None and server is None
        if kubeconfig is not None:
            self.rotates = _load_kubeconfig(configuration, kubeconfig, first)
        elif server is None:
            with PackageErrors(IN_CLUSTER):
                config.load_incluster_config(configuration, try_refresh_token=False)
        if server:
            configuration.host = server
        self.server: str = configuration.host
        _choose_proxy(configuration, self._source)
        for value in configuration.api_key.values():
            self._header(value)
        self.pool = _make_pool(configuration, self._source)

    def authentication(self) -> dict[str, str]:
        """Return the headers by which the server knows us, with a token that the package may refresh for that."""
        with PackageErrors(self._source):
            settings = self._configuration.auth_settings()
        return {item["key"].title(): self._header(item["value"]) for item in settings.values() if item.get("value")}

    def _header(self, value: str) -> str:
        scheme, _, token = value.partition(" ")
        return f"{scheme} {usable_token(token, f'{self._source}: credentials')}"


def _load_kubeconfig(configuration: Any, kubeconfig: str, first: bool) -> bool:
    """Fill the package's configuration; return whether that is from files that others replace in time."""
    from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

    for path in kubeconfig.split(":"):
        with PackageErrors(path), Path(path).expanduser().open("rb"):
            pass  # the package passes over files that are not there
    with PackageErrors(kubeconfig):
        merged = KubeConfigMerger(kubeconfig).config
        for kind in ("clusters", "contexts", "users"):
            for entry in merged.value[kind]:
                entry.name = f"{entry.path}: {kind}"  # the package's, part of its errors, quotes the credentials
        loader = KubeConfigLoader(merged, config_base_path=None)  # paths count from the file that they are in
        context = merged["contexts"].get_with_name(merged["current-context"])["context"]
        cluster = merged["clusters"].get_with_name(context["cluster"]).value["cluster"]
        user, folder = _find_user(merged, context)
        check_entries(cluster, user, kubeconfig)
        files = [name for name in _FILES if user.get(name)]
        token = read_token(user, folder, kubeconfig, first=first)
        user.pop("tokenFile", None)  # to the package it counts less than a token, even when it is empty
        if token:
            user["token"] = token
        loader.load_and_set(configuration)
    return bool(files) and not user.keys() & _RUNS


def _find_user(merged: Any, context: Any) -> tuple[dict[str, Any], Path]:
    """Return the fields of the context's user, none if it names no user, and the folder that paths count from.

    Raises `LookupError` for a user that is not there: to go on without credentials would blame the server.
    """
    name, users = context.safe_get("user"), merged.safe_get("users")
    if not name:
        return {}, Path()
    found = merged["users"].get_with_name(name, safe=True) if users else None
    if found is None:
        raise LookupError(f"the current context names user {name!r}, and there is none of that name")
    return found.value["user"], Path(found.path).parent


def _choose_proxy(configuration: Any, source: str) -> None:
    """Have the package use the proxy of the kubeconfig, whatever `NO_PROXY` says, or else that of the environment."""
    if not configuration.proxy:
        configuration.proxy = http_proxy_for(configuration.host, os.environ) or None
    if not configuration.proxy:
        return
    with PackageErrors(f"{source}: proxy"):
        proxy = urlsplit(configuration.proxy)
    if proxy.scheme.lower().startswith("socks"):
        if find_spec("socks") is None:
            raise ClientError(f"{source}: a SOCKS proxy needs the Python package PySocks, which is not installed")
    elif proxy.username is not None:
        from urllib3 import make_headers

        credentials = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        configuration.proxy_headers = make_headers(proxy_basic_auth=credentials)


def _make_pool(configuration: Any, source: str) -> Any:
    import urllib3
    from kubernetes.client.rest import RESTClientObject

    context = _tls(configuration, source)
    if not configuration.verify_ssl:  # asked for in so many words: no warning per request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with PackageErrors("connection settings"):
        pool = RESTClientObject(configuration).pool_manager
    # Certificates of ours are in the context already, and loading them anew while others connect is not safe.
    pool.connection_pool_kw |= {"ssl_context": context, "cert_file": None, "key_file": None}
    return pool


def _tls(configuration: Any, source: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an intermediate authority alone will do, as for Go and curl
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
            # A password callback, so that an encrypted key is an error and no question on the terminal.
            context.load_cert_chain(configuration.cert_file, configuration.key_file, lambda: "")
    return context


class PackageErrors:
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
        from yaml import YAMLError

        logging.getLogger().removeFilter(self._hear)
        expected = (ConfigException, OSError, YAMLError, ValueError, TypeError, LookupError, AttributeError)
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
