"""The API server that kubectl talks to: the test API server, with discovery, PATCH, DELETE as it is, and RBAC."""

from __future__ import annotations

import importlib
import json
import ssl
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tests.apiserver import ApiServer, SeenRequest, statuses
from tests.apiserver.handler import Handler
from tests.apiserver.resources import Resource
from tests.walk import rbac
from tests.walk.resources import PODS, Object, Place, described, find
from tests.walk.store import ClusterStore

PATCHES = {
    "application/strategic-merge-patch+json": "strategic",
    "application/merge-patch+json": "merge",
    "application/json-patch+json": "json",
}
VERSION = "1.36"


class PatchError(ValueError):
    """A patch that does not fit the object."""


class ControlPlane(ApiServer):
    """An API server with RBAC. `forbidden` has what somebody asked for and was not allowed to do."""

    def __init__(self, tls: ssl.SSLContext, logs: Path) -> None:
        """`logs` is the folder with the logs of Pods, `<name>.log`."""
        super().__init__(tokens=[rbac.ADMIN], tls=tls)
        self.store: ClusterStore = ClusterStore()
        self.handler = _Handler
        self.logs = logs
        self.forbidden: list[str] = []


class _Handler(Handler):
    api: ControlPlane

    def do_PATCH(self) -> None:  # noqa: N802 - the base class calls it that
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = SeenRequest(self.command, parts.path, query, dict(self.headers.items()), body)
        self.api.requests.add(request)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.api.store.changed:  # accounts and roles of one moment
            user = rbac.user_of(self.api.store, token)
            place = find(parts.path)
            verb = rbac.verb_of(self.command, place, watch=request.is_watch) if place else ""
            allowed = not place or rbac.allowed(self.api.store, user, verb, place)
        if not user:
            self._answer(401, statuses.error(401, None))
        elif answer := described(parts.path):
            self._write(200, json.dumps(answer).encode(), "application/json")
        elif not place:
            self._answer(404, statuses.NO_RESOURCE)
        elif allowed:
            self._serve_place(place, request)
        else:
            self.api.forbidden.append(f"{user} cannot {verb} {place.resource.plural} of group {place.resource.group!r}")
            self._answer(403, statuses.status(403, "Forbidden", self.api.forbidden[-1]))

    def _serve_place(self, place: Place, request: SeenRequest) -> None:
        if problem := self._problem(request):
            self._answer(400, statuses.status(400, "BadRequest", problem))
        elif (place.resource, place.subresource) == (PODS, "log"):
            self._write(200, (self.api.logs / f"{place.name}.log").read_bytes(), "text/plain")
        else:
            self._dispatch(place.resource, place.namespace, place.name, request.query, request.body)

    def _problem(self, request: SeenRequest) -> str:
        """Return what is wrong with a new object, if its sender wants to know."""
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
            self._answer(200, store.end_pod(key))
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

    def _patch(self, present: Object, patch: str) -> None:
        try:
            self._answer(200, self.api.store.update(patched(present, PATCHES[self.headers["Content-Type"]], patch)))
        except PatchError as error:
            self._answer(422, statuses.status(422, "Invalid", str(error)))


def patched(body: Object, kind: str, patch: str) -> Object:
    """Return an object as a patch changes it: by kubectl's own code, which the real server uses as well."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "object.json")
        file.write_text(json.dumps(body))
        command = ["kubectl", "patch", "--local", "-f", str(file), f"--type={kind}", "-p", patch, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PatchError(done.stderr.strip())
    found: Any = json.loads(done.stdout)
    return dict(found)
