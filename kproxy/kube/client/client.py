"""HTTP to the API server, by the plainest way to it that there is.

The API classes of the `kubernetes` package are never touched: they cost many times the time and memory of reading the
bytes ourselves. It is imported only where credentials need it, and urllib3 when a client is made.
"""
# ruff: noqa: PLC0415 - kubernetes and urllib3 cost megabytes, and only those who have a client need them

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from urllib.parse import urlencode, urlsplit

from kproxy import __version__
from kproxy.kube.client.cluster_access import ClientError, ClusterAccess, StaticAccess, check_server, find_static_config
from kproxy.kube.client.plugin_access import PluginAccess
from kproxy.kube.client.response import ApiResponse, TransportErrors

CONNECT_TIMEOUT = 10.0
"""Seconds for TCP and TLS to come up."""
ROTATION_PERIOD = 60.0
"""Seconds after which credentials are read again that others replace: the kubelet does so before a token expires."""
_JSON = "application/json"
log = logging.getLogger(__name__)


class ApiClient:
    """A client of one API server, for any number of threads."""

    def __init__(self, kubeconfig: str | None, server: str | None) -> None:
        self.answered: Callable[[str, str, str, float], None] = lambda *_: None
        """Told of each request: method, the server's `host:port`, status (`<error>` without one), seconds it took.

        Not told of those that ask in vain for something optional: nobody has to do anything about them.
        """
        self._kubeconfig, self._server = kubeconfig, server
        self._lock = threading.Lock()
        self._generation = 0
        self._use(_load_access(kubeconfig, server, None))

    @classmethod
    def from_config(cls, kubeconfig: str | None = None, server: str | None = None) -> ApiClient:
        """Return a client for a kubeconfig file, or for the Pod's service account if there is none.

        `server` is a URL that overrides the kubeconfig's; without a kubeconfig it is used without
        credentials. Raises `ClientError`.
        """
        return cls(kubeconfig, server)

    def get(
        self,
        path: str,
        params: Mapping[str, str],
        timeout: float,
        accept: str = _JSON,
        *,
        absences: Collection[int] = (),
    ) -> ApiResponse:
        """Send a GET and return as soon as the headers are there; `timeout` is seconds without any byte.

        `accept` has the media types to choose from, best first. Lists may come compressed, watches not: gzip would
        hold events back. `absences` are statuses by which the server says that it does not have something optional.
        Raises `TransportError`, or `ClientError` if credentials that have to be read anew cannot be.
        """
        encoding = "identity" if "watch" in params else "gzip"
        url = f"{path}?{urlencode(params)}" if params else path
        headers = {"Accept": accept, "Accept-Encoding": encoding}
        return self._send("GET", url, timeout, headers, None, uncounted=absences)

    def post(self, path: str, body: bytes, timeout: float) -> ApiResponse:
        """Send a JSON object; otherwise like `get`."""
        return self._send("POST", path, timeout, {"Accept": _JSON, "Content-Type": _JSON}, body)

    def renew(self, seen: ApiResponse | None) -> None:
        """Read the configuration anew because the server did not accept the credentials of `seen`.

        Does nothing if that has been done since. Raises `ClientError`; what was loaded stays in use then.
        """
        with self._lock:
            if seen is None or seen.generation == self._generation:
                self._load()

    def close(self) -> None:
        """Close the idle connections. Open answers are closed by those who read them."""
        with self._lock:
            self._access.pool.clear()

    def _load(self) -> None:
        self._use(_load_access(self._kubeconfig, self._server, self._access))

    def _use(self, access: ClusterAccess) -> None:
        self._access = access
        self._base = access.server.rstrip("/")
        self._loaded = time.monotonic()
        self._generation += 1

    def _send(
        self,
        method: str,
        url: str,
        timeout: float,
        headers: dict[str, str],
        body: bytes | None,
        *,
        uncounted: Collection[int] = (),
    ) -> ApiResponse:
        from urllib3 import Timeout

        with self._lock:
            self._read_rotated_again()
            pool, base, generation = self._access.pool, self._base, self._generation
            headers |= self._access.authentication()
        headers["User-Agent"] = f"kproxy/{__version__}"
        code, began = "<error>", time.monotonic()
        try:
            with TransportErrors():
                raw = pool.request(
                    method,
                    base + url,
                    body=body,
                    headers=headers,
                    timeout=Timeout(connect=CONNECT_TIMEOUT, read=timeout),
                    preload_content=False,
                    retries=False,
                )
                code = str(raw.status)
                return ApiResponse(raw, generation)
        finally:
            if code not in map(str, uncounted):
                self.answered(method, urlsplit(base).netloc, code, time.monotonic() - began)

    def _read_rotated_again(self) -> None:
        if self._access.rotates and time.monotonic() - self._loaded >= ROTATION_PERIOD:
            try:
                self._load()
            except ClientError as error:
                self._loaded = time.monotonic()
                log.warning("keeping the credentials in use: %s", error)


def _load_access(kubeconfig: str | None, server: str | None, before: ClusterAccess | None) -> ClusterAccess:
    if server:
        check_server(server, None)
    first = before is None
    plain = find_static_config(kubeconfig, server, os.environ, first=first)
    access: ClusterAccess = StaticAccess(plain, before) if plain else PluginAccess(kubeconfig, server, first=first)
    check_server(access.server, kubeconfig)
    return access
