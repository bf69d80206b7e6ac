"""The server's objects, their resourceVersions, and the history from which it serves watches."""

from __future__ import annotations

import base64
import copy
import json
import threading
import uuid
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.apiserver.resources import RESOURCES, Resource, resource_of
from tests.apiserver.selectors import Selector, Stored

Object = dict[str, Any]


class NotFoundError(KeyError):
    pass


class ConflictError(ValueError):
    pass


class ExpiredError(Exception):
    """410 Gone: the requested resourceVersion was compacted."""


@dataclass(frozen=True)
class Change:
    """The change at one resourceVersion. `before` is None for a creation, `after` for a deletion."""

    version: int
    before: Stored | None
    after: Stored | None

    def event_for(self, matches: Selector) -> tuple[str, Stored] | None:
        """Return the event for a watch with this selector."""
        old = self.before if self.before and matches(self.before) else None
        new = self.after if self.after and matches(self.after) else None
        if new:
            return ("MODIFIED" if old else "ADDED"), new
        return ("DELETED", _at_version(old, self.version)) if old else None


def _at_version(item: Stored, version: int) -> Stored:
    body = json.loads(item.raw)
    body["metadata"]["resourceVersion"] = str(version)
    return Stored(item.key, item.namespace, version, _dump(body), item.labels, item.fields)


def _dump(body: Object) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _key(resource: Resource, metadata: Object) -> str:
    return f"{metadata['namespace']}/{metadata['name']}" if resource.namespaced else str(metadata["name"])


class Store:
    """All objects. `changed` is notified of every change, and by the server of faults."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1
        self._objects: dict[Resource, dict[str, Stored]] = {item: {} for item in RESOURCES}
        self._history: dict[Resource, list[Change]] = defaultdict(list)
        self._compacted = 0
        self._snapshots: dict[tuple[Resource, int], list[Stored]] = {}

    def create(self, body: Object) -> Object:
        resource = resource_of(body["apiVersion"], body["kind"])
        body = copy.deepcopy(body)
        metadata = body["metadata"]
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        if "generateName" in metadata:
            metadata.setdefault("name", metadata["generateName"] + uuid.uuid4().hex[:5])
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        with self.changed:
            if _key(resource, metadata) in self._objects[resource]:
                raise ConflictError(_key(resource, metadata))
            return self._put(resource, body)

    def update(self, body: Object) -> Object:
        resource = resource_of(body["apiVersion"], body["kind"])
        body = copy.deepcopy(body)
        metadata = body["metadata"]
        if resource.namespaced:
            metadata.setdefault("namespace", "default")
        with self.changed:
            present = self.get(resource, _key(resource, metadata))["metadata"]
            metadata |= {name: present[name] for name in ("uid", "creationTimestamp")}
            return self._put(resource, body)

    def delete(self, resource: Resource, key: str) -> None:
        with self.changed:
            old = self._stored(resource, key)
            self.version += 1
            del self._objects[resource][key]
            self._record(resource, Change(self.version, old, None))

    def get(self, resource: Resource, key: str) -> Object:
        with self.changed:
            body: Object = json.loads(self._stored(resource, key).raw)
            return {"kind": resource.kind, "apiVersion": resource.api_version} | body

    def keys(self, resource: Resource) -> list[str]:
        with self.changed:
            return sorted(self._objects[resource])

    def compact(self) -> None:
        """Answer new watches and continue tokens of older resourceVersions with 410 from now on."""
        with self.changed:
            self.version += 1  # as etcd's own writes do: even the latest list is older than the history now
            self._compacted = self.version
            self._snapshots.clear()

    def snapshot(self, resource: Resource, matches: Selector) -> tuple[int, list[Stored]]:
        """Return the current version and the objects, sorted by key."""
        with self.changed:
            items = self._objects[resource]
            return self.version, [items[key] for key in sorted(items) if matches(items[key])]

    def page(self, resource: Resource, matches: Selector, limit: int, token: str) -> tuple[int, list[Stored], str, int]:
        """Return version, objects, the next token and the number of objects after this page."""
        with self.changed:
            if token:
                version, start = _read_token(token)
                items = self._snapshots.get((resource, version))
                if items is None:
                    raise ExpiredError(start)
                items = [item for item in items if matches(item) and item.key + "\0" > start]
                items = items[1:] if items and items[0].key + "\0" == start else items
            else:
                version, items = self.snapshot(resource, matches)
            if not limit or len(items) <= limit:
                return version, items, "", 0
            if not token:
                self._snapshots[resource, version] = items
            return version, items[:limit], make_token(version, items[limit - 1].key), len(items) - limit

    def require(self, version: int) -> None:
        """Raise `ExpiredError` if a watch can no longer start at this version."""
        with self.changed:
            if version < self._compacted:
                raise ExpiredError(f"too old resource version: {version} ({self._compacted})")

    def changes_after(self, resource: Resource, version: int) -> tuple[int, list[Change]]:
        """Return the current version and the changes to a resource since an earlier one."""
        with self.changed:
            history = self._history[resource]
            return self.version, history[bisect_right(history, version, key=_version_of) :]

    def _stored(self, resource: Resource, key: str) -> Stored:
        try:
            return self._objects[resource][key]
        except KeyError:
            raise NotFoundError(key) from None

    def _put(self, resource: Resource, body: Object) -> Object:
        self.version += 1
        metadata = body["metadata"]
        metadata["resourceVersion"] = str(self.version)
        key = _key(resource, metadata)
        bare = {name: value for name, value in body.items() if name not in {"kind", "apiVersion"}}
        new = Stored(
            key,
            metadata.get("namespace", ""),
            self.version,
            _dump(bare),
            dict(metadata.get("labels") or {}),
            _fields(resource, body),
        )
        old = self._objects[resource].get(key)
        self._objects[resource][key] = new
        self._record(resource, Change(self.version, old, new))
        return body

    def _record(self, resource: Resource, change: Change) -> None:
        self._history[resource].append(change)
        self.changed.notify_all()


def _version_of(change: Change) -> int:
    return change.version


def _fields(resource: Resource, body: Object) -> dict[str, str]:
    metadata = body["metadata"]
    fields = {"metadata.name": metadata["name"], "metadata.namespace": metadata.get("namespace", "")}
    for path in resource.selectable:
        outer, inner = path.split(".")
        fields[path] = str((body.get(outer) or {}).get(inner, ""))
    return fields


def make_token(version: int, key: str) -> str:
    text = _dump({"v": "meta.k8s.io/v1", "rv": version, "start": key + "\0"})
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def _read_token(token: str) -> tuple[int, str]:
    found = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    return found["rv"], found["start"]
