"""The controllers of the emulated cluster: they write EndpointSlices for each change of Services and pods."""

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
    """Services, EndpointSlices and pods of one namespace. Thread-safe."""

    def __init__(self, server: ApiServer, namespace: str, allocator: Allocator, zones: Mapping[str, str]) -> None:
        """`zones` are the zones of the nodes, by node name."""
        self._server = server
        self._namespace = namespace
        self._allocator = allocator
        self._zones = zones
        self._lock = threading.RLock()
        self._pods: dict[str, PodState] = {}

    def apply(self, manifest: Object) -> Object:
        """Create or replace an object; return it as stored by the server."""
        with self._lock:
            resource = _resource(manifest["kind"])
            body = manifest | {"metadata": manifest["metadata"] | {"namespace": self._namespace}}
            if resource is SERVICES:
                body = self._allocator.complete(body, self._current(body["metadata"]["name"]))
            self._server.apply(body)
            self._reconcile()
            return self.get(resource.kind, body["metadata"]["name"])

    def set_load_balancer_ip(self, service: str, address: str, ip_mode: str) -> None:
        """Set the ingress address in a Service's status."""
        with self._lock:
            ingress = [{"ip": address, "ipMode": ip_mode}]
            self._server.update(self.get("Service", service) | {"status": {"loadBalancer": {"ingress": ingress}}})

    def get(self, kind: str, name: str) -> Object:
        """Return an object. Raises `NotFoundError`."""
        return self._server.store.get(_resource(kind), f"{self._namespace}/{name}")

    def delete(self, kind: str, name: str) -> None:
        """Delete an object. Raises `NotFoundError`."""
        with self._lock:
            self._server.delete(self.get(kind, name))
            self._reconcile()

    def put(self, *pods: PodState) -> None:
        """Add or replace pods."""
        with self._lock:
            self._pods |= {pod.name: pod for pod in pods}
            self._reconcile()

    def change(self, name: str, **fields: Any) -> None:
        """Change some fields of a pod."""
        with self._lock:
            self.put(msgspec.structs.replace(self._pods[name], **fields))

    def remove(self, name: str) -> None:
        """Remove a pod."""
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
        """Update the managed EndpointSlices. Slices that a test created itself stay untouched."""
        desired: dict[str, Object] = {}
        for service in self._objects(SERVICES):
            found = slices_of(service, list(self._pods.values()), self._zones)
            desired |= {each["metadata"]["name"]: each for each in found}
        current = {each["metadata"]["name"]: each for each in self._objects(ENDPOINT_SLICES) if _is_managed(each)}
        for name in current.keys() - desired.keys():
            self._server.delete(current[name])
        for name, each in desired.items():
            if name not in current or _differs(current[name], each):
                self._server.apply(each)

    def _objects(self, resource: Resource) -> list[Object]:
        keys = self._server.store.keys(resource)
        return [self._server.store.get(resource, key) for key in keys if key.startswith(f"{self._namespace}/")]

    def _current(self, service: str) -> Object:
        try:
            return self.get("Service", service)
        except NotFoundError:
            return NOTHING


def _resource(kind: str) -> Resource:
    if kind not in RESOURCES:
        raise ValueError(f"the emulated cluster has no {kind}, only {', '.join(RESOURCES)}")
    return RESOURCES[kind]


def _is_managed(found: Object) -> bool:
    labels: dict[str, str] = found["metadata"].get("labels", {})
    return labels.get(MANAGED_BY) == CONTROLLER


def _differs(current: Object, desired: Object) -> bool:
    return any(current[name] != desired[name] for name in ("endpoints", "ports"))


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
