"""The cluster's objects: those of the test API server and more kinds, with generations and statuses."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from tests.apiserver.resources import Resource
from tests.apiserver.store import ConflictError, Store
from tests.migration.resources import ALL, PODS, Object, resource_of


class ClusterStore(Store):
    """What the server, the controllers and the kubelets share. Hold `changed` while you read in order to write."""

    def __init__(self) -> None:
        super().__init__()
        self._objects = {item: {} for item in ALL}

    def create(self, body: Object) -> Object:
        """Add an object, and return it with its name; raise `ConflictError` if there is one of this name."""
        body = copy.deepcopy(body)
        metadata = body["metadata"]
        if "generateName" in metadata:
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
        resource = resource_of(body)
        with self.changed:
            if key_of(body) in self._objects[resource]:
                raise ConflictError(metadata["name"])
            return self._put(resource, body)

    def update(self, body: Object) -> Object:
        """Replace an object but for its status; its generation grows if its specification becomes another."""

        def replace(present: Object) -> None:
            own = {name: present["metadata"][name] for name in ("uid", "creationTimestamp", "generation")}
            own["generation"] += body.get("spec") != present.get("spec")
            status = {"status": present["status"]} if "status" in present else {}
            present |= body | {"metadata": body["metadata"] | own} | status

        return self.change(resource_of(body), key_of(body), replace)

    def set_status(self, body: Object, status: Object) -> None:
        """Write the status of an object if it is a new one, and the object still there."""
        with self.changed:
            if body.get("status") != status and key_of(body) in self.keys(resource_of(body)):
                self.change(resource_of(body), key_of(body), lambda each: each.update(status=status))

    def change(self, resource: Resource, key: str, change: Callable[[Object], object]) -> Object:
        """Store an object as `change` changes it; raise `NotFoundError` if there is none."""
        with self.changed:
            body = self.get(resource, key)
            change(body)
            return self._put(resource, body)

    def end_pod(self, key: str) -> Object:
        """Mark a Pod as one that its kubelet is to end."""

        def mark(pod: Object) -> None:
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            pod["metadata"].setdefault("deletionTimestamp", now())
            pod["metadata"].setdefault("deletionGracePeriodSeconds", grace)

        return self.change(PODS, key, mark)

    def all(self, resource: Resource) -> list[Object]:
        """Return all objects of a resource."""
        with self.changed:
            return [self.get(resource, key) for key in self.keys(resource)]


def key_of(body: Object) -> str:
    """Return the name of an object, behind its namespace if it is in one."""
    metadata = body["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if "namespace" in metadata else str(metadata["name"])


def now() -> str:
    """Return the present time as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
