"""A real cluster, with the interface that the tests use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from tests.e2e.cluster import IpFamily, Need, Node, Object, Outcome, Pod
from tests.e2e.manifests import url
from tests.e2e.real import outside
from tests.e2e.real.agents import Agents
from tests.e2e.real.api import Api, object_path
from tests.e2e.real.diagnosis import diagnosis
from tests.e2e.real.execution import Execution, Executor
from tests.e2e.real.load import RealLoad
from tests.e2e.real.objects import (
    UNREADY_FILE,
    client_pod,
    is_ready,
    pod_of,
    serving_pod,
)
from tests.e2e.real.proxies import RealProxies
from tests.e2e.real.scripts import (
    GET,
    LOAD,
    REQUEST_FROM_ONE_SOCKET,
    REQUEST_TCP,
    REQUEST_UDP,
    RESOLVE,
    outcome,
    status_and_body,
)
from tests.e2e.waiting import until

PODS_GUARD = 600.0
"""Maximum seconds until pods are ready. The first ones wait for their image."""


class Access(msgspec.Struct, frozen=True):
    """Access to the cluster, and the image of the test pods."""

    api: Api
    executor: Executor
    agents: Agents
    image: str


class ClusterFacts(msgspec.Struct, frozen=True):
    """Facts that do not change while tests run. `dns` is the ClusterIP of the cluster's DNS, "" without one."""

    nodes: Sequence[Node]
    families: Sequence[IpFamily]
    node_addresses: set[str]
    dns: str


class RealCluster:
    """The cluster with a namespace for one test."""

    def __init__(self, access: Access, proxies: RealProxies, facts: ClusterFacts, namespace: str) -> None:
        self.families = facts.families
        self.nodes = facts.nodes
        self.proxies = proxies
        self._api, self._executor, self._agents = access.api, access.executor, access.agents
        self._facts = facts
        self._namespace, self._image = namespace, access.image
        self._sockets: dict[tuple[str, str, int], Execution] = {}
        self._loads = 0

    def close(self) -> None:
        """Delete the pods without waiting for their grace period."""
        for socket in self._sockets.values():
            socket.close()
        for pod in self._api.items(object_path("Pod", self._namespace)):
            self._api.delete(object_path("Pod", self._namespace, pod["metadata"]["name"]), grace=1)

    def lacks(self, need: Need) -> str:
        """Return why the cluster does not meet a requirement, "" if it does."""
        if need in {"IPv4", "IPv6"}:
            return self._lacks_family(need)
        if need == "two nodes":
            return "" if len(self.nodes) > 1 else f"{self.nodes[0].name} is the only schedulable node"
        if need in {"outside", "outside over IPv6"}:
            return self._lacks_outside("IPv6" if need == "outside over IPv6" else self.families[0])
        if need == "DNS":
            return "" if self._facts.dns else "no Service of kube-system has the label k8s-app=kube-dns"
        if need == "kube-proxy":
            return self.proxies.lacks_kube_proxy()
        # No controller serves the load balancer class of the tests, so they can always set the address themselves.
        return "" if need == "load balancer address" else f"the test pods do not support {need}"

    def pod(self, name: str, node: str, labels: Mapping[str, str] | None = None, *, host_network: bool = False) -> Pod:
        """Create a pod."""
        if labels and not host_network:
            return self._make([serving_pod(name, node, self._image, labels)])[0]
        return self._make([client_pod(name, node, self._image, host_network=host_network)])[0]

    def pods(self, name: str, node: str, labels: Mapping[str, str], count: int) -> list[Pod]:
        """Create pods."""
        return self._make([serving_pod(f"{name}-{number}", node, self._image, labels) for number in range(count)])

    def delete_pod(self, pod: Pod, grace: int = 5) -> None:
        """Start deleting a pod."""
        self._api.delete(object_path("Pod", self._namespace, pod.name), grace)

    def make_unready(self, pod: Pod) -> None:
        """Make a pod's readiness probe fail."""
        self._run(pod, f"touch {UNREADY_FILE}")

    def apply(self, manifest: Object) -> Object:
        """Create or update an object."""
        metadata = manifest["metadata"] | {"namespace": self._namespace}
        path = object_path(manifest["kind"], self._namespace, metadata["name"])
        return self._api.apply(path, manifest | {"metadata": metadata})

    def get(self, kind: str, name: str) -> Object:
        """Return an object."""
        return self._api.get(object_path(kind, self._namespace, name))

    def delete(self, kind: str, name: str) -> None:
        """Delete an object."""
        self._api.delete(object_path(kind, self._namespace, name))

    def set_load_balancer_ip(self, service: str, address: str, ip_mode: Literal["VIP", "Proxy"] = "VIP") -> None:
        """Set the ingress address in a Service's status."""
        status = {"loadBalancer": {"ingress": [{"ip": address, "ipMode": ip_mode}]}}
        self._api.merge(f"{object_path('Service', self._namespace, service)}/status", {"status": status})

    def request(self, client: Pod, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from a pod."""
        if protocol == "UDP":
            lines = self._run(client, REQUEST_UDP, address, port, times)
        else:
            lines = self._run(client, REQUEST_TCP, url(address, port, ""), times)
        return [outcome(line) for line in lines]

    def request_from_outside(self, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from this machine."""
        return [outside.send_request(address, port, protocol) for _ in range(times)]

    def request_from_one_socket(self, client: Pod, address: str, port: int, *, times: int) -> list[Outcome]:
        """Send UDP requests from one socket, which stays open until the end of the test."""
        key = (client.name, address, port)
        if key not in self._sockets:
            self._sockets[key] = self._executor.start(
                self._namespace, client.name, REQUEST_FROM_ONE_SOCKET, address, port, stdin=True
            )
        return [self._request_again(self._sockets[key]) for _ in range(times)]

    def load(self, client: Pod, address: str, port: int) -> RealLoad:
        """Send requests continuously."""
        self._loads += 1
        end = f"/tmp/{self._namespace}-load-{self._loads}-ends"
        return RealLoad(
            lambda: self._executor.start(self._namespace, client.name, LOAD, url(address, port, ""), end),
            lambda: self._run(client, f"touch {end}"),
        )

    def get_from_node(self, node: str, url: str) -> tuple[int, str]:
        """Return status and body of a GET made on a node. Raises `ConnectionError`."""
        return self._agents.get(node, url)

    def get_from_pod(self, client: Pod, url: str) -> tuple[int, str]:
        """Return status and body of a GET made in a pod. Raises `ConnectionError`."""
        return status_and_body("\n".join(self._run(client, GET, url)))

    def resolve(self, client: Pod, name: str, family: IpFamily, protocol: str = "UDP") -> list[str]:
        """Return the addresses of a name."""
        record = "AAAA" if family == "IPv6" else "A"
        target = "+tcp" if protocol == "TCP" else "+notcp"
        lines = self._run(client, RESOLVE, self._facts.dns, name, record, target)
        return [line for line in lines if line and not line.startswith(";")]

    def diagnose(self) -> str:
        """Return a report for people after a failure."""
        return diagnosis(self._api, self.proxies, self._namespace)

    def _make(self, manifests: list[Object]) -> list[Pod]:
        for manifest in manifests:
            self._api.create(object_path("Pod", self._namespace), manifest)
        names = [manifest["metadata"]["name"] for manifest in manifests]
        found = until(lambda: self._ready(names), f"pods {names} are ready", guard=PODS_GUARD)
        return [pod_of(pod) for pod in found]

    def _ready(self, names: list[str]) -> list[Object]:
        """Return the pods of these names once all are ready, before that an empty list."""
        pods = {pod["metadata"]["name"]: pod for pod in self._api.items(object_path("Pod", self._namespace))}
        return [pods[name] for name in names] if all(name in pods and is_ready(pods[name]) for name in names) else []

    def _run(self, pod: Pod, script: str, *arguments: object) -> list[str]:
        return self._executor.lines(self._namespace, pod.name, script, *arguments)

    def _request_again(self, socket: Execution) -> Outcome:
        socket.write("again\n")
        line = socket.line()
        if line is None:
            raise ConnectionError("the script with the socket has exited")
        return outcome(line)

    def _lacks_outside(self, family: IpFamily) -> str:
        if reason := self._lacks_family(family):
            return reason
        nodes = [Node(node.name, {family: node.addresses[family]}) for node in self.nodes]
        return outside.unusable_reason(nodes, self._facts.node_addresses)

    def _lacks_family(self, family: str) -> str:
        if family not in self.families:
            return f"Services get no {family} addresses, only {' and '.join(self.families)}"
        without = [node.name for node in self.nodes if family not in node.addresses]
        return f"nodes without an {family} InternalIP: {', '.join(without)}" if without else ""
