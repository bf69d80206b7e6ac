"""Serve one HTTP connection: lists, single objects and writes. `watching` serves watches."""

from __future__ import annotations

import gzip
import json
import socket
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

from tests.apiserver import protobuf, statuses
from tests.apiserver.events import event_problems
from tests.apiserver.requests import SeenRequest
from tests.apiserver.resources import EVENTS, SERVICES, Resource, find_path
from tests.apiserver.selectors import Selector, SelectorError, field_test, label_test
from tests.apiserver.store import ConflictError, ExpiredError, NotFoundError, make_token
from tests.apiserver.watching import Watch
from tests.apiserver.writing import JsonWriter, ProtobufWriter, accepts_protobuf

if TYPE_CHECKING:
    from tests.apiserver.server import ApiServer

GZIP_FROM = 128 * 1024
"""Minimum size in bytes of an answer that kube-apiserver compresses."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    api: ApiServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name in the base class
        pass

    def setup(self) -> None:
        super().setup()
        self.api.connections.add(self.connection)

    def finish(self) -> None:
        self.api.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.api.requests.add(SeenRequest(self.command, parts.path, query, dict(self.headers.items()), body))
        failing = self.api.faults.next_failure(parts.path, query)
        if failing:
            self._answer(failing.status, statuses.error(failing.status, failing.retry_after), failing.retry_after)
        elif not self._authenticated():
            self._answer(401, statuses.error(401, None))
        elif self.api.faults.protobuf == "refused" and protobuf.MEDIA_TYPE in self.headers.get("Accept", ""):
            self._answer(406, statuses.error(406, None))
        elif parts.path in {"/readyz", "/healthz", "/livez"}:
            self._write(200, b"ok", "text/plain")
        elif found := find_path(parts.path):
            self._dispatch_unless_hidden(*found, query, body)
        else:
            self._answer(404, statuses.NO_RESOURCE)

    def _authenticated(self) -> bool:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return not self.api.tokens or (scheme.lower() == "bearer" and token in self.api.tokens)

    def _dispatch_unless_hidden(
        self, resource: Resource, namespace: str, name: str, query: dict[str, str], body: bytes
    ) -> None:
        hidden = self.api.faults.hidden.get(resource.plural)
        if hidden is None:
            self._dispatch(resource, namespace, name, query, body)
        elif hidden == 404:
            self._answer(404, statuses.NO_RESOURCE)
        else:
            verb = "watch" if "watch" in query else "list"
            self._answer(403, statuses.forbidden(resource.plural, resource.group, verb))

    def _dispatch(self, resource: Resource, namespace: str, name: str, query: dict[str, str], body: bytes) -> None:
        if self.command == "GET" and not name:
            self._collection(resource, namespace, query)
            return
        key = f"{namespace}/{name}" if resource.namespaced else name
        try:
            self._object(resource, namespace, key, body)
        except NotFoundError:
            self._answer(404, statuses.status(404, "NotFound", f'{resource.plural} "{name}" not found'))
        except ConflictError as error:
            text = f'{resource.plural} "{error}" already exists'
            self._answer(409, statuses.status(409, "AlreadyExists", text))

    def _object(self, resource: Resource, namespace: str, key: str, body: bytes) -> None:
        store = self.api.store
        if self.command == "GET":
            self._answer(200, store.get(resource, key))
        elif self.command == "DELETE":
            store.delete(resource, key)
            self._answer(200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})
        else:
            self._put(resource, namespace, json.loads(body))

    def _put(self, resource: Resource, namespace: str, sent: dict[str, Any]) -> None:
        sent |= {"kind": resource.kind, "apiVersion": resource.api_version}
        if resource.namespaced and sent["metadata"].setdefault("namespace", namespace) != namespace:
            self._answer(400, statuses.status(400, "BadRequest", statuses.OTHER_NAMESPACE))
        elif resource is EVENTS and (problems := event_problems(sent)):
            self._answer(
                422, statuses.invalid(resource.kind, resource.group, sent["metadata"].get("name", ""), problems)
            )
        elif self.command == "POST":
            self._answer(201, self.api.store.create(sent))
        else:
            self._answer(200, self.api.store.update(sent))

    def _collection(self, resource: Resource, namespace: str, query: dict[str, str]) -> None:
        try:
            matches = self._selector(resource, namespace, query)
        except SelectorError as error:
            self._answer(400, statuses.status(400, "BadRequest", str(error)))
            return
        if query.get("watch") in {"1", "true"}:
            self._watch(resource, matches, query)
        else:
            self._list(resource, matches, query)

    def _selector(self, resource: Resource, namespace: str, query: dict[str, str]) -> Selector:
        selectable = resource.selectable
        if resource is SERVICES and not self.api.faults.service_fields:
            selectable = ()
        labels = label_test(query.get("labelSelector", ""))
        fields = field_test(query.get("fieldSelector", ""), selectable)
        return lambda item: (not namespace or item.namespace == namespace) and labels(item) and fields(item)

    def _list(self, resource: Resource, matches: Selector, query: dict[str, str]) -> None:
        token = query.get("continue", "")
        try:
            version, items, following, left = self.api.store.page(
                resource, matches, int(query.get("limit") or 0), token
            )
        except ExpiredError as error:
            fresh = make_token(-1, str(error).rstrip("\0"))
            self._answer(410, statuses.expired_continue(fresh))
            return
        except (ValueError, LookupError) as error:
            text = f"invalid continue token: continue key is not valid: {error}"
            self._answer(400, statuses.status(400, "BadRequest", text))
            return
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if following:
            metadata["continue"] = following
            if not query.get("labelSelector") and not query.get("fieldSelector"):
                metadata["remainingItemCount"] = left
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
        if self._sends_protobuf(f"{resource.kind}List"):
            body = protobuf.enveloped(head | {"items": [json.loads(item.raw) for item in items]})
            self._write(200, body, protobuf.MEDIA_TYPE)
            return
        opening = json.dumps(head, separators=(",", ":")).encode()[:-1]
        body = opening + b',"items":[' + b",".join(item.raw for item in items) + b"]}\n"
        self._write(200, body, "application/json")

    def _watch(self, resource: Resource, matches: Selector, query: dict[str, str]) -> None:
        if "sendInitialEvents" in query and (refused := self._watch_list_refusal(query)):
            self._answer(422, refused)
            return
        self.send_response(200)
        writer = ProtobufWriter() if self._sends_protobuf(resource.kind) else JsonWriter()
        self.send_header("Content-Type", writer.content_type)
        self.send_header("Cache-Control", "no-cache, private")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        Watch(self.api, self.connection, resource, matches, query, writer=writer).serve()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_WR)

    def _watch_list_refusal(self, query: dict[str, str]) -> dict[str, Any] | None:
        if self.api.faults.watch_list == "forbidden":
            return statuses.watch_list_forbidden(
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
            )
        if query.get("resourceVersionMatch") != "NotOlderThan" and self.api.faults.watch_list != "ignored":
            return statuses.watch_list_forbidden(
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            )
        return None

    def _answer(self, code: int, body: dict[str, Any], retry_after: int | None = None) -> None:
        if self._sends_protobuf(body["kind"]):
            self._write(code, protobuf.enveloped(body), protobuf.MEDIA_TYPE, retry_after)
        else:
            self._write(code, json.dumps(body).encode() + b"\n", "application/json", retry_after)

    def _sends_protobuf(self, kind: str) -> bool:
        able = self.api.faults.protobuf == "supported" and kind in protobuf.KINDS
        return able and accepts_protobuf(self.headers.get("Accept", ""))

    def _write(self, code: int, body: bytes, content_type: str, retry_after: int | None = None) -> None:
        compress = len(body) >= GZIP_FROM and "gzip" in self.headers.get("Accept-Encoding", "")
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-cache, private")
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        if compress:
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Vary", "Accept-Encoding")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
