"""The cluster's objects: the store of the test API server with more kinds, generations and statuses."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from tests.apiserver.resources import Resource
from tests.apiserver.store import ConflictError, Store
from tests.migration.resources import ALL, PODS, Object, resource_of


class ClusterStore(Store):
    """The store that server, controllers and kubelets share. Hold `changed` from a read to a dependent write."""

    def __init__(self) -> None:
        super().__init__()
        self._objects = {item: {} for item in ALL}

    def create(self, body: Object) -> Object:
        """Add an object and return it with its generated fields. Raises `ConflictError` if the name exists."""
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
        """Replace an object except its status. The generation increases if the specification changes."""

        def replace(current: Object) -> None:
            metadata = {name: current["metadata"][name] for name in ("uid", "creationTimestamp", "generation")}
            metadata["generation"] += body.get("spec") != current.get("spec")
            status = {"status": current["status"]} if "status" in current else {}
            current |= body | {"metadata": body["metadata"] | metadata} | status

        return self.change(resource_of(body), key_of(body), replace)

    def set_status(self, body: Object, status: Object) -> None:
        """Update the status of an object if it differs and the object still exists."""
        with self.changed:
            if body.get("status") != status and key_of(body) in self.keys(resource_of(body)):
                self.change(resource_of(body), key_of(body), lambda each: each.update(status=status))

    def change(self, resource: Resource, key: str, change: Callable[[Object], object]) -> Object:
        """Apply `change` to an object and store it. Raises `NotFoundError` if the object does not exist."""
        with self.changed:
            body = self.get(resource, key)
            change(body)
            return self._put(resource, body)

    def terminate_pod(self, key: str) -> Object:
        """Mark a Pod as terminating, so that its kubelet stops it."""

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
    """Return `namespace/name` of an object, or its name if it is not namespaced."""
    metadata = body["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if "namespace" in metadata else str(metadata["name"])


def now() -> str:
    """Return the current time in the format of the API."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
