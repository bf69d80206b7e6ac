"""The HTTP client of the API server: sends requests, and reloads or refreshes credentials.

The client sends requests with urllib3 and returns the raw bytes of the responses. The API classes of the `kubernetes`
package are not used, because they take many times as much CPU time and memory. The package is imported only if the
credentials need it. urllib3 is imported only when a client is created.
"""
# ruff: noqa: PLC0415 - urllib3 takes megabytes of memory; only processes with a client load it

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
"""Seconds to wait for the TCP connection and the TLS handshake."""
ROTATION_PERIOD = 60.0
"""Seconds between reloads of credentials from files. The kubelet replaces a Pod's token well before its expiry."""
_JSON = "application/json"
log = logging.getLogger(__name__)


class ApiClient:
    """A client of one API server. Thread-safe.

    Reloading or refreshing the credentials may run a program, which can take arbitrarily long. Only one thread does
    this at a time. The other threads continue with the current credentials, and wait only if these have expired or the
    server has rejected them.
    """

    def __init__(self, kubeconfig: str | None, server: str | None) -> None:
        self.observe_request: Callable[[str, str, str, float], None] = lambda *_: None
        """A function that the client calls after each request.

        Its arguments are the method, the server's `host:port`, the HTTP status, and the seconds until the response
        headers arrived. The status is `<error>` if there was no response. The function is not called for a response
        whose status is one of the request's `optional_statuses`.
        """
        self._kubeconfig, self._server = kubeconfig, server
        self._updating = threading.Lock()
        self._updates = 0
        self._update_error: ClientError | None = None
        self._use(_load_access(kubeconfig, server, None))

    @classmethod
    def from_config(cls, kubeconfig: str | None = None, server: str | None = None) -> ApiClient:
        """Return a client for a kubeconfig file. Without a kubeconfig, use the Pod's service account.

        The URL `server` overrides the kubeconfig's. If there is a `server` but no kubeconfig, the client uses no
        credentials. Raises `ClientError`.
        """
        return cls(kubeconfig, server)

    @property
    def server(self) -> str:
        """The server's URL."""
        return self._access.server

    def get(
        self,
        path: str,
        params: Mapping[str, str],
        timeout: float,
        accept: str = _JSON,
        *,
        optional_statuses: Collection[int] = (),
    ) -> ApiResponse:
        """Send a GET request and return once the response headers have arrived.

        `timeout` is the maximum number of seconds without data, not the duration of the whole response. `accept` lists
        media types, the preferred one first. Lists may be compressed, but watches are not: gzip would delay events.
        `optional_statuses` are the statuses that mean that an optional resource is not available.

        Raises `TransportError`, or `ClientError` if the credentials have expired and cannot be refreshed.
        """
        encoding = "identity" if "watch" in params else "gzip"
        url = f"{path}?{urlencode(params)}" if params else path
        headers = {"Accept": accept, "Accept-Encoding": encoding}
        return self._send("GET", url, timeout, headers, None, optional_statuses=optional_statuses)

    def post(self, path: str, body: bytes, timeout: float) -> ApiResponse:
        """Send a JSON object in a POST request. `timeout`, the result and the errors are as for `get`."""
        return self._send("POST", path, timeout, {"Accept": _JSON, "Content-Type": _JSON}, body)

    def renew(self, rejected: ApiResponse | None) -> None:
        """Reload the credentials after the server rejected them. `rejected` is the response, with status 401.

        Does nothing if the credentials have been replaced since that request. If `rejected` is None, reloads unless
        another thread is already updating the credentials. Raises `ClientError` if the reload fails; the current
        credentials then stay in use.
        """
        if self._is_current(rejected):
            self._update(lambda: self._load() if self._is_current(rejected) else None, wait=True)

    def close(self) -> None:
        """Close the idle connections. The connection of an open response is not closed."""
        self._access.pool.clear()

    def _send(
        self,
        method: str,
        url: str,
        timeout: float,
        headers: dict[str, str],
        body: bytes | None,
        *,
        optional_statuses: Collection[int] = (),
    ) -> ApiResponse:
        from urllib3 import Timeout

        self._update_credentials()
        access = self._access
        credentials = access.auth_headers
        headers |= credentials
        headers["User-Agent"] = f"kproxy/{__version__}"
        status, start = "<error>", time.monotonic()
        try:
            with TransportErrors():
                raw = access.pool.request(
                    method,
                    access.server.rstrip("/") + url,
                    body=body,
                    headers=headers,
                    timeout=Timeout(connect=CONNECT_TIMEOUT, read=timeout),
                    preload_content=False,
                    retries=False,
                )
                status = str(raw.status)
                return ApiResponse(raw, credentials)
        finally:
            if status not in map(str, optional_statuses):
                self.observe_request(method, urlsplit(access.server).netloc, status, time.monotonic() - start)

    def _is_current(self, response: ApiResponse | None) -> bool:
        return response is None or response.credentials is self._access.auth_headers

    def _update_credentials(self) -> None:
        """Reload credentials from files that may have been replaced, or refresh a token that is about to expire.

        If another thread is already doing this, waits for it only if the token has expired. Raises `ClientError` if the
        token has expired and cannot be refreshed. Other failures are logged, and the current credentials stay in use.
        """
        access = self._access
        if access.expired:
            self._update(self._refresh_if_due, wait=True)
        elif access.refresh_due:
            self._try_to_update(self._refresh_if_due, "refresh")
        elif self._reload_due():
            self._try_to_update(self._reload_if_due, "reload")

    def _try_to_update(self, action: Callable[[], None], verb: str) -> None:
        try:
            self._update(action, wait=False)
        except ClientError as error:
            log.warning("cannot %s the credentials, keeping the current ones: %s", verb, error)

    def _refresh_if_due(self) -> None:
        if self._access.refresh_due:
            self._access.refresh()

    def _reload_due(self) -> bool:
        return self._access.rotates and time.monotonic() - self._loaded >= ROTATION_PERIOD

    def _reload_if_due(self) -> None:
        if self._reload_due():
            self._loaded = time.monotonic()  # after a failure too: the next attempt is due one period later
            if self._access.files_changed:
                self._load()

    def _update(self, action: Callable[[], None], *, wait: bool) -> None:
        """Update the credentials with `action`. Only one thread does this at a time.

        If another thread is already updating the credentials, `action` is not called. With `wait`, this method then
        waits for the other thread's update, and fails if that update fails. Without `wait`, it returns at once. Raises
        `ClientError`.
        """
        updates = self._updates
        if not self._updating.acquire(blocking=wait):
            return
        try:
            if self._updates == updates:
                self._update_error = None
                try:
                    action()
                except ClientError as error:
                    self._update_error = error
                self._updates += 1
            if self._update_error is not None:
                raise ClientError(str(self._update_error))
        finally:
            self._updating.release()

    def _load(self) -> None:
        self._use(_load_access(self._kubeconfig, self._server, self._access))

    def _use(self, access: ClusterAccess) -> None:
        self._access = access
        self._loaded = time.monotonic()


def _load_access(kubeconfig: str | None, server: str | None, previous: ClusterAccess | None) -> ClusterAccess:
    if server:
        check_server(server, None)
    first = previous is None
    config = find_static_config(kubeconfig, server, os.environ, first=first)
    access: ClusterAccess = StaticAccess(config, previous) if config else PluginAccess(kubeconfig, server, first=first)
    check_server(access.server, kubeconfig)
    return access
