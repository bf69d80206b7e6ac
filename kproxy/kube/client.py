"""HTTP to the API server: credentials, TLS and connections come from the `kubernetes` package, nothing else.

Its API classes are never touched: they cost many times the time and memory of reading the bytes ourselves.
The package itself is imported when a client is made, not with this module.
"""
# ruff: noqa: PLC0415 - kubernetes and urllib3 cost tens of megabytes, and only those who have a client need them

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import yaml

from kproxy import __version__

CONNECT_TIMEOUT = 10.0
"""Seconds for TCP and TLS to come up."""

TOKEN_FILE_PERIOD = 60.0
"""Seconds after which a kubeconfig's `tokenFile` is read again: the kubelet replaces it before it expires."""

_KEEPALIVE = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]  # a peer that vanished is found within a minute
_CHUNK = 1 << 16

log = logging.getLogger(__name__)


class ClientError(Exception):
    """The configuration or the credentials cannot be used; the message is one line: which file, what, why."""


class TransportError(Exception):
    """No connection, or it broke; the message is one line."""


class SilenceError(TransportError):
    """Nothing arrived for the timeout of the request."""


class Response:
    """One HTTP answer: `status`, `headers`, and the body either by `read` or by `lines`.

    `generation` counts the credentials that the client had loaded when it sent the request.
    """

    def __init__(self, raw: Any, generation: int) -> None:
        self.status = int(raw.status)
        self.headers: Mapping[str, str] = raw.headers
        self.generation = generation
        self._raw = raw

    def read(self) -> bytes:
        """Return the whole body, decompressed. Raises `TransportError`."""
        with _Translated():
            body: bytes = self._raw.read(decode_content=True)
            return body

    def lines(self) -> Iterator[bytes]:
        """Yield each complete line without its end, as soon as it is there; what follows the last is dropped.

        Raises `SilenceError` if nothing arrives for the request's timeout, else `TransportError` if the
        connection breaks off; ends normally if the server ended the answer.
        """
        tail: list[bytes] = []  # joined once per line: a line of megabytes comes in thousands of pieces
        for chunk in self._chunks():
            first, *others = chunk.split(b"\n")
            tail.append(first)
            if not others:
                continue
            yield b"".join(tail)
            yield from others[:-1]
            tail = [others[-1]]

    def _chunks(self) -> Iterator[bytes]:
        chunked = getattr(self._raw, "chunked", False)
        source = self._raw.read_chunked(_CHUNK, decode_content=True) if chunked else None
        while True:
            with _Translated():
                chunk = next(source, b"") if source else self._raw.read1(_CHUNK, decode_content=True)
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """Cut the connection. For any thread: one that waits for data wakes up, and is to call `release`."""
        with suppress(OSError, ValueError, RuntimeError):  # read to its end, or closed already
            self._raw.shutdown()

    def release(self) -> None:
        """Give up the answer, read to its end or not. Only for the thread that reads."""
        self._raw.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Client:
    """A client of one API server, for any number of threads."""

    def __init__(self, kubeconfig: str | None, server: str | None) -> None:
        self.answered: Callable[[str, str, str, float], None] = lambda *_: None
        """Told of each request: method, the server's `host:port`, status (`<error>` without one), seconds it took."""
        self._kubeconfig, self._server = kubeconfig, server
        self._lock = threading.Lock()
        self._generation = 0
        self._load()

    @classmethod
    def from_config(cls, kubeconfig: str | None = None, server: str | None = None) -> Client:
        """Return a client for a kubeconfig file, or for the Pod's service account if there is none.

        `server` is a URL that overrides the kubeconfig's; without a kubeconfig it is used without
        credentials. Raises `ClientError`.
        """
        return cls(kubeconfig, server)

    def get(self, path: str, params: Mapping[str, str], timeout: float) -> Response:
        """Send a GET and return as soon as the headers are there; `timeout` is seconds without any byte.

        Lists may come compressed, watches not: gzip would hold events back. Raises `TransportError`, or
        `ClientError` if credentials that have to be read anew cannot be.
        """
        encoding = "identity" if "watch" in params else "gzip"
        url = f"{path}?{urlencode(params)}" if params else path
        return self._send("GET", url, timeout, {"Accept-Encoding": encoding}, None)

    def post(self, path: str, body: bytes, timeout: float) -> Response:
        """Send a JSON object; otherwise like `get`."""
        return self._send("POST", path, timeout, {"Content-Type": "application/json"}, body)

    def renew(self, seen: Response | None) -> None:
        """Read the configuration anew because the server did not accept the credentials of `seen`.

        Does nothing if that has been done since. Raises `ClientError`; what was loaded stays in use then.
        """
        with self._lock:
            if seen is None or seen.generation == self._generation:
                self._load()

    def close(self) -> None:
        """Close the idle connections. Open answers are closed by those who read them."""
        with self._lock:
            self._pool.clear()

    def _load(self) -> None:
        if self._server:
            _check_server(self._server, None)
        configuration = _load_configuration(self._kubeconfig, self._server)
        with _Explained(self._kubeconfig or "kubeconfig"):
            self._reads_token_file = _names_token_file(self._kubeconfig)
        base = self._server or configuration.host
        _check_server(base, self._kubeconfig)
        pool = _make_pool(configuration)
        self._configuration, self._pool, self._base = configuration, pool, base.rstrip("/")
        self._loaded = time.monotonic()
        self._generation += 1

    def _send(self, method: str, url: str, timeout: float, headers: dict[str, str], body: bytes | None) -> Response:
        from urllib3 import Timeout

        with self._lock:
            self._read_token_file_again()
            pool, base, generation = self._pool, self._base, self._generation
            headers |= self._authentication()
        headers |= {"Accept": "application/json", "User-Agent": f"kproxy/{__version__}"}
        code, began = "<error>", time.monotonic()
        try:
            with _Translated():
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
                return Response(raw, generation)
        finally:
            self.answered(method, urlsplit(base).netloc, code, time.monotonic() - began)

    def _read_token_file_again(self) -> None:
        # The kubernetes package refreshes a service account's token and an exec plugin's, but not this.
        if self._reads_token_file and time.monotonic() - self._loaded >= TOKEN_FILE_PERIOD:
            try:
                self._load()
            except ClientError as error:
                self._loaded = time.monotonic()
                log.warning("keeping the credentials in use: %s", error)

    def _authentication(self) -> dict[str, str]:
        source = self._kubeconfig or "in-cluster service account"
        with _Explained(source):
            settings = self._configuration.auth_settings()  # runs the package's hook, which refreshes a token
        return {item["key"].title(): item["value"].strip() for item in settings.values() if item.get("value")}


def _load_configuration(kubeconfig: str | None, server: str | None) -> Any:
    from kubernetes import config
    from kubernetes.client.configuration import Configuration

    configuration = Configuration()
    configuration.socket_options = _KEEPALIVE
    configuration.connection_pool_maxsize = 4
    if kubeconfig is not None:
        for path in kubeconfig.split(":"):
            with _Explained(path), Path(path).expanduser().open("rb"):
                pass  # the package passes over files that are not there
        with _Explained(kubeconfig):
            config.load_kube_config(kubeconfig, client_configuration=configuration, persist_config=False)
    elif server is None:
        with _Explained("in-cluster service account"):
            config.load_incluster_config(client_configuration=configuration)
    if server:
        configuration.host = server
    _check_certificates(configuration, kubeconfig or "in-cluster service account")
    return configuration


def _check_server(server: str, source: str | None) -> None:
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
        with _Explained(f"{source}: certificate authority {configuration.ssl_ca_cert}"):
            context.load_verify_locations(configuration.ssl_ca_cert)
    if configuration.cert_file:
        with _Explained(f"{source}: client certificate {configuration.cert_file}, key {configuration.key_file}"):
            # A password callback, so that an encrypted key is an error and no question on the terminal.
            context.load_cert_chain(configuration.cert_file, configuration.key_file, lambda: "")


def _make_pool(configuration: Any) -> Any:
    import urllib3
    from kubernetes.client.rest import RESTClientObject

    if not configuration.verify_ssl:  # asked for in so many words: no warning per request
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    with _Explained("connection settings"):
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


class _Explained:
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


class _Translated:
    """Turns the exceptions of urllib3 and of sockets into `TransportError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        if isinstance(error, ReadTimeoutError | TimeoutError):
            raise SilenceError("nothing arrived in time") from None
        # A read on an answer that another thread closes ends in whatever its half-closed state gives.
        if isinstance(error, HTTPError | OSError | ValueError | AttributeError):
            raise TransportError(" ".join(str(error).split()) or type(error).__name__) from None
