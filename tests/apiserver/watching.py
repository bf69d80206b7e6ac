"""Serve one watch: initial events, changes, bookmarks, and its end."""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Any

from tests.apiserver import statuses
from tests.apiserver.resources import Resource
from tests.apiserver.selectors import Selector
from tests.apiserver.store import Change, ExpiredError
from tests.apiserver.writing import Writer

if TYPE_CHECKING:
    from tests.apiserver.server import ApiServer

CLIENT_CHECK_INTERVAL = 0.5
"""Seconds between checks that the client is still connected."""


class Watch:
    """One watch on the connection that requested it."""

    def __init__(
        self,
        api: ApiServer,
        connection: socket.socket,
        resource: Resource,
        matches: Selector,
        query: dict[str, str],
        *,
        writer: Writer,
    ) -> None:
        self._writer = writer
        self._api, self._connection, self._resource, self._wanted = api, connection, resource, matches
        self._query = query
        self._epoch = api.faults.epoch
        self._bookmarks = query.get("allowWatchBookmarks") in {"1", "true"}
        self._end = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        self._next_bookmark = time.monotonic() + api.bookmark_interval
        self._injected = len(api.faults.injected)
        self._version = 0

    def serve(self) -> None:
        """Serve until the client or the server ends the watch. Only a clean end writes the last chunk."""
        if self._begin():
            self._stream()

    def _begin(self) -> bool:
        """Send what precedes the first change; return False if the watch has ended already."""
        support = self._api.faults.watch_list
        initial = "sendInitialEvents" in self._query and support != "ignored"
        if initial and support == "old-etcd":
            self._send(self._writer.event("ERROR", statuses.OLD_ETCD))
            self._finish()
            return False
        given = self._query.get("resourceVersion", "")
        if given not in {"", "0"}:
            self._version = int(given)
            return self._check_version()
        self._version, items = self._api.store.snapshot(self._resource, self._wanted)
        for item in items:
            self._send(self._writer.stored("ADDED", self._resource, item))
        if initial:
            self._bookmark({"annotations": {"k8s.io/initial-events-end": "true"}})
        return True

    def _check_version(self) -> bool:
        try:
            self._api.store.require(self._version)
        except ExpiredError as error:
            self._send(self._writer.event("ERROR", statuses.status(410, "Expired", str(error))))
            self._finish()
            return False
        return True

    def _stream(self) -> None:
        changed = self._api.store.changed
        while self._is_client_connected():
            with changed:
                if not self._has_news():
                    next_event = min(self._end, self._next_bookmark) - time.monotonic()
                    changed.wait(max(0.0, min(next_event, CLIENT_CHECK_INTERVAL)))
            if self._epoch != self._api.faults.epoch or self._api.stopping:
                self._end_as_requested()
                return
            self._send_changes()
            if time.monotonic() >= self._end:
                self._finish()
                return
            if self._bookmarks and time.monotonic() >= self._next_bookmark:
                self._next_bookmark = time.monotonic() + self._api.bookmark_interval
                if not self._is_ahead():
                    self._bookmark({})

    def _has_news(self) -> bool:
        faults = self._api.faults
        if self._epoch != faults.epoch or self._api.stopping or len(faults.injected) > self._injected:
            return True
        return not self._is_ahead() and bool(self._api.store.changes_after(self._resource, self._version)[1])

    def _is_ahead(self) -> bool:
        """Return whether the watch started at a future version. It gets no events until the server reaches it.

        kube-apiserver behaves so after its etcd was restored from an older backup (kubernetes/kubernetes#107457).
        """
        return self._version > self._api.store.version

    def _send_changes(self) -> None:
        with self._api.store.changed:  # read both under one lock: a line injected before a change is sent before it
            lines = self._api.faults.injected[self._injected :]
            changes: list[Change] = []
            if not self._is_ahead():
                self._version, changes = self._api.store.changes_after(self._resource, self._version)
        self._injected += len(lines)
        for line in lines:
            self._send(self._writer.injected(line))
        for change in changes:
            if event := change.event_for(self._wanted):
                self._send(self._writer.stored(event[0], self._resource, event[1]))

    def _end_as_requested(self) -> None:
        ending = "drop" if self._api.stopping else self._api.faults.ending
        if ending == "clean":
            self._finish()
        elif ending == "silent":
            while self._is_client_connected() and not self._api.stopping:
                with self._api.store.changed:
                    self._api.store.changed.wait(CLIENT_CHECK_INTERVAL)
        elif ending == "mid-line":
            self._send(self._writer.partial_event)
        elif ending in {"gone", "error"}:
            self._send(self._writer.event("ERROR", statuses.error(410 if ending == "gone" else 500, None)))
            self._finish()

    def _bookmark(self, more: dict[str, Any]) -> None:
        kind = {"kind": self._resource.kind, "apiVersion": self._resource.api_version}
        metadata = {"resourceVersion": str(self._version), **more}
        self._send(self._writer.event("BOOKMARK", kind | {"metadata": metadata} | self._resource.empty))

    def _send(self, data: bytes) -> None:
        size = self._api.faults.piece or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self._connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _finish(self) -> None:
        self._connection.sendall(b"0\r\n\r\n")

    def _is_client_connected(self) -> bool:
        readable, _, _ = select.select([self._connection], [], [], 0)
        return not readable or bool(self._connection.recv(1, socket.MSG_PEEK))
