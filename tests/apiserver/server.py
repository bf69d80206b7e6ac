"""The server as tests use it: objects, faults, received requests, start and stop."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from tests.apiserver.faults import FailingRequests, Faults, WatchListSupport
from tests.apiserver.handler import Handler
from tests.apiserver.requests import SeenRequests
from tests.apiserver.resources import resource_of
from tests.apiserver.store import NotFoundError, Object, Store


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # tests disconnect clients on purpose


class ApiServer:
    """An API server on loopback.

    `tokens` are the accepted bearer tokens; without any, there is no authentication. `bookmark_interval` is in seconds.
    With a `tls` context, the server speaks HTTPS.
    """

    def __init__(
        self,
        *,
        tokens: Iterable[str] = (),
        bookmark_interval: float = 60.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.store = Store()
        self.faults = Faults()
        self.requests = SeenRequests()
        self.tokens = set(tokens)
        self.bookmark_interval = bookmark_interval
        self.stopping = False
        self.connections: set[socket.socket] = set()
        self._tls = tls
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None
        self.address = ("127.0.0.1", 0)
        self.handler: type[Handler] = Handler

    def __enter__(self) -> ApiServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen. After a `stop`, the port and the objects are the same as before."""
        self.stopping = False
        handler = type("_Handler", (self.handler,), {"api": self})
        self._http = _Http(self.address, handler)
        if self._tls:
            self._http.socket = self._tls.wrap_socket(self._http.socket, server_side=True)
        self.address = ("127.0.0.1", self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port and break all connections."""
        if not self._http or not self._thread:
            return
        self._wake(stopping=True)
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._http = self._thread = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.address[0]}:{self.address[1]}"

    def kubeconfig(self, path: Path, *, port: int | None = None, token: str | None = None) -> Path:
        """Write a kubeconfig for this server, or for a relay's `port` in front of it."""
        scheme = "https" if self._tls else "http"
        cluster = {"server": f"{scheme}://127.0.0.1:{port or self.address[1]}", "insecure-skip-tls-verify": True}
        chosen = token or next(iter(self.tokens), None)
        user = {"token": chosen} if chosen else {}
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "test", "user": user}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "current-context": "test",
                }
            )
        )
        return path

    def create(self, body: Object) -> Object:
        return self.store.create(body)

    def update(self, body: Object) -> Object:
        return self.store.update(body)

    def apply(self, body: Object) -> Object:
        """Create the object, or replace an existing one."""
        try:
            return self.store.update(body)
        except NotFoundError:
            return self.store.create(body)

    def delete(self, body: Object) -> None:
        """Delete the object of this kind, namespace and name."""
        resource = resource_of(body["apiVersion"], body["kind"])
        metadata = body["metadata"]
        namespace = metadata.get("namespace", "default")
        key = f"{namespace}/{metadata['name']}" if resource.namespaced else metadata["name"]
        self.store.delete(resource, key)

    def compact(self) -> None:
        """Drop the history: watches and lists that resume from older versions get status 410."""
        self.store.compact()

    def restore_backup(self, *objects: Object) -> None:
        """Restart on an etcd restored from a backup: only these objects exist, and resourceVersions are lower."""
        self.stop()
        self.store = Store()
        for body in objects:
            self.create(body)
        self.start()

    def fail_requests(
        self,
        status: int,
        times: int = 1,
        *,
        retry_after: int | None = None,
        matches: Callable[[str, dict[str, str]], bool] = lambda _path, _query: True,
    ) -> None:
        """Answer the next matching requests (path, query) with an error."""
        with self.faults.lock:
            self.faults.failing.append(FailingRequests(status, times, retry_after, matches))

    def set_watch_list(self, support: WatchListSupport) -> None:
        """Set the answer to `sendInitialEvents` from now on."""
        self.faults.watch_list = support

    def hide(self, plural: str, status: Literal[403, 404]) -> None:
        """Answer requests for a resource with 404 (as a server without it) or 403 (no permission) from now on."""
        self.faults.hidden[plural] = status

    def show(self, plural: str) -> None:
        """Serve a hidden resource again."""
        del self.faults.hidden[plural]

    def drop_watches(self) -> None:
        """Break the connections of all open watches."""
        self._end_watches("drop")

    def end_watches(self) -> None:
        """End all open watches cleanly, as their timeout does."""
        self._end_watches("clean")

    def silence_watches(self) -> None:
        """Keep all open watches open, but send nothing more on them."""
        self._end_watches("silent")

    def cut_watches_mid_line(self) -> None:
        """Break the connections of all open watches in the middle of an event."""
        self._end_watches("mid-line")

    def expire_watches(self) -> None:
        """End all open watches with an ERROR event, code 410."""
        self._end_watches("gone")

    def fail_watches(self) -> None:
        """End all open watches with an ERROR event, code 500."""
        self._end_watches("error")

    def inject(self, line: bytes) -> None:
        """Send a line on all open watches."""
        with self.store.changed:
            self.faults.injected.append(line)
            self.store.changed.notify_all()

    def _end_watches(self, ending: Any) -> None:
        with self.store.changed:
            self.faults.ending = ending
            self.faults.epoch += 1
            self.store.changed.notify_all()

    def _wake(self, *, stopping: bool = False) -> None:
        with self.store.changed:
            self.stopping = self.stopping or stopping
            self.store.changed.notify_all()
