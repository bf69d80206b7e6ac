"""The cluster's controllers, in one: they are told of each change, and write to the API server what follows from it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from tests.apiserver import ApiServer, NotFoundError
from tests.apiserver.resources import ENDPOINT_SLICES, SERVICES, Resource
from tests.e2e.cluster import Node, Object
from tests.e2e.local.services import NOTHING, Allocator
from tests.e2e.local.slices import CONTROLLER, MANAGED_BY, PodState, slices_of

RESOURCES = {each.kind: each for each in (SERVICES, ENDPOINT_SLICES)}


class Controller:
    """Services, slices and pods of one namespace. Threads may use it at the same time."""

    def __init__(self, server: ApiServer, namespace: str, allocator: Allocator, zones: Mapping[str, str]) -> None:
        """`zones` are those of the nodes, by name."""
        self._server = server
        self._namespace = namespace
        self._allocator = allocator
        self._zones = zones
        self._lock = threading.RLock()
        self._pods: dict[str, PodState] = {}

    def apply(self, manifest: Object) -> Object:
        """Create an object or put it in the place of the present one; return it as the server has it."""
        with self._lock:
            resource = _resource(manifest["kind"])
            body = manifest | {"metadata": manifest["metadata"] | {"namespace": self._namespace}}
            if resource is SERVICES:
                body = self._allocator.complete(body, self._present(body["metadata"]["name"]))
            self._server.apply(body)
            self._reconcile()
            return self.get(resource.kind, body["metadata"]["name"])

    def give_address(self, service: str, address: str, ip_mode: str) -> None:
        """Write a load balancer's address into a Service's status."""
        with self._lock:
            ingress = [{"ip": address, "ipMode": ip_mode}]
            self._server.update(self.get("Service", service) | {"status": {"loadBalancer": {"ingress": ingress}}})

    def get(self, kind: str, name: str) -> Object:
        """Return an object; raise `NotFoundError` if it is not there."""
        return self._server.store.get(_resource(kind), f"{self._namespace}/{name}")

    def delete(self, kind: str, name: str) -> None:
        """Delete an object; raise `NotFoundError` if it is not there."""
        with self._lock:
            self._server.delete(self.get(kind, name))
            self._reconcile()

    def put(self, *pods: PodState) -> None:
        """Take in pods that are new or have changed."""
        with self._lock:
            self._pods |= {pod.name: pod for pod in pods}
            self._reconcile()

    def change(self, name: str, **fields: Any) -> None:
        """Change some fields of a pod."""
        with self._lock:
            self.put(msgspec.structs.replace(self._pods[name], **fields))

    def remove(self, name: str) -> None:
        """Take in that a pod is gone."""
        with self._lock:
            del self._pods[name]
            self._reconcile()

    def clear(self) -> None:
        """Delete everything."""
        with self._lock:
            self._pods.clear()
            for resource in (SERVICES, ENDPOINT_SLICES):
                for item in self._objects(resource):
                    self._server.delete(item)

    def objects(self, kind: str) -> list[Object]:
        """Return all objects of a kind."""
        with self._lock:
            return self._objects(_resource(kind))

    def diagnose(self) -> str:
        """Return all objects and pods as YAML."""
        with self._lock:
            objects: list[Any] = [item for resource in RESOURCES.values() for item in self._objects(resource)]
            return yaml.safe_dump_all([*objects, msgspec.to_builtins(self._pods)], sort_keys=False)

    def _reconcile(self) -> None:
        """Let the slices be those of the Services; those that a test has made itself are left alone."""
        wanted: dict[str, Object] = {}
        for service in self._objects(SERVICES):
            found = slices_of(service, list(self._pods.values()), self._zones)
            wanted |= {each["metadata"]["name"]: each for each in found}
        present = {each["metadata"]["name"]: each for each in self._objects(ENDPOINT_SLICES) if _is_ours(each)}
        for name in present.keys() - wanted.keys():
            self._server.delete(present[name])
        for name, each in wanted.items():
            if name not in present or _differs(present[name], each):
                self._server.apply(each)

    def _objects(self, resource: Resource) -> list[Object]:
        keys = self._server.store.keys(resource)
        return [self._server.store.get(resource, key) for key in keys if key.startswith(f"{self._namespace}/")]

    def _present(self, service: str) -> Object:
        try:
            return self.get("Service", service)
        except NotFoundError:
            return NOTHING


def _resource(kind: str) -> Resource:
    if kind not in RESOURCES:
        raise ValueError(f"the cluster of namespaces has no {kind}; it has {', '.join(RESOURCES)}")
    return RESOURCES[kind]


def _is_ours(found: Object) -> bool:
    labels: dict[str, str] = found["metadata"].get("labels", {})
    return labels.get(MANAGED_BY) == CONTROLLER


def _differs(present: Object, wanted: Object) -> bool:
    return any(present[name] != wanted[name] for name in ("endpoints", "ports"))


def node_object(node: Node, pod_cidrs: tuple[str, ...]) -> Object:
    """Return a Node as kubelet and its controllers write it."""
    labels = {"kubernetes.io/hostname": node.name, "topology.kubernetes.io/zone": node.zone}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name, "labels": labels},
        "spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)},
        "status": {
            "addresses": [{"type": "InternalIP", "address": address} for address in node.addresses.values()],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
