"""The control plane's API server: the test API server with discovery, patches, graceful Pod deletion and RBAC."""

from __future__ import annotations

import importlib
import json
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.apiserver import ApiServer, SeenRequest, statuses
from tests.apiserver.handler import Handler
from tests.apiserver.resources import Resource
from tests.deploy.patch import PatchError, patched
from tests.migration import rbac
from tests.migration.resources import PODS, Object, RequestTarget, discovery, find
from tests.migration.store import ClusterStore

PATCHES = {
    "application/strategic-merge-patch+json": "strategic",
    "application/merge-patch+json": "merge",
    "application/json-patch+json": "json",
}
VERSION = "1.36"


class ControlPlane(ApiServer):
    """An API server with RBAC. `forbidden` lists the requests that it rejected with status 403."""

    def __init__(self, tls: ssl.SSLContext, logs: Path) -> None:
        """`logs` is the directory with the logs of Pods, `<name>.log`."""
        super().__init__(tokens=[rbac.ADMIN], tls=tls)
        self.store: ClusterStore = ClusterStore()
        self.handler = _Handler
        self.logs = logs
        self.forbidden: list[str] = []


class _Handler(Handler):
    api: ControlPlane

    def do_PATCH(self) -> None:  # noqa: N802 - named by BaseHTTPRequestHandler
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = SeenRequest(self.command, parts.path, query, dict(self.headers.items()), body)
        self.api.requests.add(request)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.api.store.changed:  # a consistent view of accounts and roles
            user = rbac.user_of(self.api.store, token)
            target = find(parts.path)
            verb = rbac.verb_of(self.command, target, watch=request.is_watch) if target else ""
            allowed = not target or rbac.allowed(self.api.store, user, verb, target)
        if not user:
            self._answer(401, statuses.error(401, None))
        elif response := discovery(parts.path):
            self._write(200, json.dumps(response).encode(), "application/json")
        elif not target:
            self._answer(404, statuses.NO_RESOURCE)
        elif allowed:
            self._serve_target(target, request)
        else:
            self.api.forbidden.append(
                f"{user} cannot {verb} {target.resource.plural} in group {target.resource.group!r}"
            )
            self._answer(403, statuses.status(403, "Forbidden", self.api.forbidden[-1]))

    def _serve_target(self, target: RequestTarget, request: SeenRequest) -> None:
        if problem := self._problem(request):
            self._answer(400, statuses.status(400, "BadRequest", problem))
        elif (target.resource, target.subresource) == (PODS, "log"):
            self._write(200, (self.api.logs / f"{target.name}.log").read_bytes(), "text/plain")
        else:
            self._dispatch(target.resource, target.namespace, target.name, request.query, request.body)

    def _problem(self, request: SeenRequest) -> str:
        """Return the validation error of a new object, if the client requests strict field validation."""
        if request.method != "POST" or request.query.get("fieldValidation") != "Strict":
            return ""
        schemas: Any = importlib.import_module("kubernetes_validate")
        try:
            schemas.validate(json.loads(request.body), VERSION, strict=True)
        except schemas.ValidationError as error:
            return f"strict decoding error: {error.message}"
        return ""

    def _object(self, resource: Resource, namespace: str, key: str, body: bytes) -> None:
        store = self.api.store
        if self.command == "DELETE" and resource is PODS:
            self._answer(200, store.terminate_pod(key))
        elif self.command == "DELETE":
            metadata = store.get(resource, key)["metadata"]
            store.delete(resource, key)
            details = {"name": metadata["name"], "kind": resource.plural, "uid": metadata["uid"]}
            success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
            self._answer(200, success)
        elif self.command == "PATCH":
            self._patch(store.get(resource, key), body.decode())
        else:
            super()._object(resource, namespace, key, body)

    def _patch(self, current: Object, patch: str) -> None:
        try:
            self._answer(200, self.api.store.update(patched(current, PATCHES[self.headers["Content-Type"]], patch)))
        except PatchError as error:
            self._answer(422, statuses.status(422, "Invalid", str(error)))
