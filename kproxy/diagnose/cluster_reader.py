"""Read what explains a Service from the API server, with the credentials of whoever runs the command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import quote

from kproxy.diagnose.caller_objects import CallerObjects
from kproxy.diagnose.cluster_objects import items
from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import SERVICE_ACCOUNT, ClientError, expand_home
from kproxy.kube.client.response import TransportError
from kproxy.kube.codec.conversion import SERVICE_NAME_LABEL
from kproxy.kube.codec.json_codec import read_error

TIMEOUT_SECONDS = 10.0
"""Maximum number of seconds without data in a response."""
PAGE_SIZE = 500
Get: TypeAlias = Callable[[str, Mapping[str, str]], tuple[bytes | None, str]]
"""Sends a GET request for a path with query parameters.

Returns the body of a successful response, or None and the message of the error that the API server reports. Raises
`ClusterReadError` if the API server does not answer.
"""
_CORE = "/api/v1"
_DISCOVERY = "/apis/discovery.k8s.io/v1"
_NETWORKING = "/apis/networking.k8s.io/v1"


class ClusterReadError(Exception):
    """The API server cannot be read. The message is one line."""


def own_kubeconfig(flag: str | None, environment: Mapping[str, str]) -> str | None:
    """Return the path of the caller's kubeconfig: the flag, $KUBECONFIG, or ~/.kube/config if it exists.

    Return None if the Pod's service account is to be used instead. Raises `ClusterReadError` if there is neither.
    """
    if flag:
        return flag
    for path in environment.get("KUBECONFIG", "").split(os.pathsep):
        if path:
            return path
    default = expand_home("~/.kube/config", environment)
    if default.exists():
        return str(default)
    if (SERVICE_ACCOUNT / "token").exists():
        return None
    raise ClusterReadError("no kubeconfig: set --kubeconfig or KUBECONFIG")


def read_with_kubeconfig(kubeconfig: str | None, key: str, node_name: str, *, all_nodes: bool = False) -> CallerObjects:
    """Read the objects about the Service `key` with a kubeconfig, or with the Pod's service account if it is None.

    The parameters are those of `read_cluster`. Raises `ClusterReadError`.
    """
    try:
        client = ApiClient.from_config(kubeconfig)
    except ClientError as error:
        raise ClusterReadError(str(error)) from None

    def get(path: str, query: Mapping[str, str]) -> tuple[bytes | None, str]:
        with client.get(path, query, TIMEOUT_SECONDS) as response:
            body = response.read()
            if response.status == 200:
                return body, ""
            error = read_error(response.status, response.headers, body)
            return None, error.message or f"HTTP status {response.status}"

    try:
        return read_cluster(get, kubeconfig or "in-cluster service account", key, node_name, all_nodes=all_nodes)
    except (ClientError, TransportError) as error:
        raise ClusterReadError(str(error)) from None
    finally:
        client.close()


def read_cluster(get: Get, source: str, key: str, node_name: str, *, all_nodes: bool = False) -> CallerObjects:
    """Read the Service `key`, its EndpointSlices and Pods, the NetworkPolicies of its namespace, and other Services.

    Only the Node `node_name` is read, unless `all_nodes` is true or it does not exist: Nodes are large. Raises
    `ClusterReadError` if neither the Service nor its EndpointSlices can be read.
    """
    return _ClusterReader(get, key).read(source, node_name, all_nodes=all_nodes)


class _ClusterReader:
    """Sends the requests about one Service."""

    def __init__(self, get: Get, key: str) -> None:
        self._send = get
        self._namespace, self._name = key.split("/", 1)
        self._objects: list[dict[str, Any]] = []
        self._seen: list[str] = []
        self._problems: list[str] = []

    def read(self, source: str, node_name: str, *, all_nodes: bool) -> CallerObjects:
        namespace = quote(self._namespace, safe="")
        services = self._read_services(namespace)
        own = {"labelSelector": f"{SERVICE_NAME_LABEL}={self._name}"}
        path = f"{_DISCOVERY}/namespaces/{namespace}/endpointslices"
        if not self._read("EndpointSlice", path, own):
            if not services:
                raise ClusterReadError("; ".join(self._problems))
        elif len(self._objects) == len(services):
            self._read("EndpointSlice", path)  # slices without the label are a common mistake
        service = next((each for each in services if self._is_own(each)), None)
        self._read_rivals(service, services)
        self._read_nodes(node_name, every=all_nodes)
        self._read_pods(namespace, service)
        self._read("NetworkPolicy", f"{_NETWORKING}/namespaces/{namespace}/networkpolicies")
        return CallerObjects(source, self._objects, self._seen, self._problems)

    def _read_services(self, namespace: str) -> list[dict[str, Any]]:
        """Read all Services, to find similar names and conflicts, or else those of the namespace, or only this one."""
        own = f"{_CORE}/namespaces/{namespace}/services"
        if self._read("Service", f"{_CORE}/services"):
            return list(self._objects)
        if self._read("Service", own):
            self._seen.remove("Service")  # not those of other namespaces
            return list(self._objects)
        found, problem = self._get(f"{own}/{quote(self._name, safe='')}", {})
        if found is None:
            self._problems.append(problem)
            return []
        self._objects.append({"kind": "Service", **found})
        return list(self._objects)

    def _read_nodes(self, node_name: str, *, every: bool) -> None:
        if not every:
            found, problem = self._get(f"{_CORE}/nodes/{quote(node_name, safe='')}", {})
            if found is not None:
                self._objects.append({"kind": "Node", **found})
                self._seen.append("Node")
                return
            if "not found" not in problem:
                self._problems.append(problem)
                return
        self._read("Node", f"{_CORE}/nodes")

    def _read_rivals(self, service: dict[str, Any] | None, services: list[dict[str, Any]]) -> None:
        """Read the slices of the Services that claim an address or NodePort of this one: they decide who owns it."""
        if service is None:
            return
        own = _claimed(service)
        for each in services:
            if each is not service and not own.isdisjoint(_claimed(each)):
                metadata = each["metadata"]
                path = f"{_DISCOVERY}/namespaces/{quote(metadata['namespace'], safe='')}/endpointslices"
                self._read("EndpointSlice", path, {"labelSelector": f"{SERVICE_NAME_LABEL}={metadata['name']}"})

    def _read_pods(self, namespace: str, service: dict[str, Any] | None) -> None:
        """Read the Pods that the Service selects; if there are none, all Pods of the namespace, to say what differs."""
        spec = (service or {}).get("spec")
        selector = spec.get("selector") if isinstance(spec, dict) else None
        if not selector:
            return
        path = f"{_CORE}/namespaces/{namespace}/pods"
        before = len(self._objects)
        query = {"labelSelector": ",".join(f"{name}={value}" for name, value in selector.items())}
        if self._read("Pod", path, query) and len(self._objects) == before:
            self._read("Pod", path)

    def _is_own(self, each: Mapping[str, Any]) -> bool:
        metadata = each.get("metadata") or {}
        return (metadata.get("namespace"), metadata.get("name")) == (self._namespace, self._name)

    def _read(self, kind: str, path: str, query: Mapping[str, str] | None = None) -> bool:
        """Add the objects of a list. Return False, and note the problem, if it cannot be read."""
        more = ""
        while True:
            page = {"limit": str(PAGE_SIZE), **(query or {}), **({"continue": more} if more else {})}
            content, problem = self._get(path, page)
            if content is None:
                self._problems.append(problem)
                return False
            self._objects += _items(kind, content)
            metadata = content.get("metadata")
            more = str(metadata.get("continue") or "") if isinstance(metadata, dict) else ""
            if not more:
                break
        if kind not in self._seen:
            self._seen.append(kind)
        return True

    def _get(self, path: str, query: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
        """Return the content of a response, or None and the problem that the API server reports."""
        body, problem = self._send(path, query)
        if body is None:
            return None, f"{path}: {problem}"
        try:
            content = json.loads(body)
        except ValueError:
            return None, f"{path}: the answer is not JSON"
        return (content, "") if isinstance(content, dict) else (None, f"{path}: the answer is not an object")


def _items(kind: str, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from items({**content, "kind": f"{kind}List"})


def _claimed(service: Mapping[str, Any]) -> set[str]:
    """Return the addresses and NodePorts of a Service, as they are in the object."""
    spec, status = service.get("spec") or {}, service.get("status") or {}
    balancer = status.get("loadBalancer") or {}
    found = {*(spec.get("clusterIPs") or ()), *(spec.get("externalIPs") or ())}
    found |= {each.get("ip") for each in balancer.get("ingress") or ()}
    found |= {f":{port.get('nodePort')}" for port in spec.get("ports") or () if port.get("nodePort")}
    return {str(each) for each in found if each and each != "None"}
