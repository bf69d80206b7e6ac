"""The interface of a cluster under test. `real` implements it with KUBECONFIG, `local` with network namespaces.

A test declares its requirements with `@needs(...)`. If the cluster does not meet one, the test is skipped with the
reason from `Cluster.lacks`. Objects are dictionaries in API form, in the namespace of the test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import msgspec

Object = dict[str, Any]
IpFamily = Literal["IPv4", "IPv6"]
Mode = Literal["iptables", "nftables"]
Need = Literal[
    "IPv4", "IPv6", "two nodes", "outside", "outside over IPv6", "DNS", "load balancer address", "kube-proxy", "SCTP"
]
"""Requirements that some clusters do not meet. "outside": a client that is neither a pod nor a node."""

HTTP_PORT = 8080
UDP_PORT = 8081


class Node(msgspec.Struct, frozen=True):
    """A node that runs pods. `addresses` are its InternalIPs; `zone` is "" if it has none."""

    name: str
    addresses: Mapping[IpFamily, str]
    zone: str = ""


class Pod(msgspec.Struct, frozen=True):
    """A running pod. It serves HTTP on `HTTP_PORT`, named `http`, and UDP on `UDP_PORT`, named `udp`.

    A pod without labels, or with hostNetwork, is a client only.
    """

    name: str
    node: str
    addresses: Mapping[IpFamily, str]


class Answer(msgspec.Struct, frozen=True):
    """An answer: the name of the pod that sent it, and the client address that the pod saw."""

    pod: str
    client: str


class Failure(msgspec.Struct, frozen=True):
    """A failed request: refused by a TCP reset or an ICMP error, unanswered, or failed otherwise."""

    kind: Literal["refused", "no answer", "other"]
    detail: str


Outcome = Answer | Failure


class Load(Protocol):
    """Sequential requests from a pod, each over a new connection, during a `with` block."""

    @property
    def answers(self) -> int:
        """The number of answered requests so far."""

    def failures(self) -> Sequence[str]:
        """Return one message with time stamp for each failed request so far."""


class Proxies(Protocol):
    """kproxy on the cluster's nodes."""

    def mode(self) -> Mode:
        """Return the proxy mode of all nodes."""

    def restart(self, node: str) -> None:
        """Stop the proxy of a node as an upgrade does; return once a new one is ready."""

    def kill(self, node: str) -> None:
        """Kill the proxy of a node with SIGKILL; return once a new one is ready."""

    def in_mode(self, mode: Mode) -> AbstractContextManager[None]:
        """Switch all nodes to a mode for the body of a `with` statement, and back afterwards."""

    def replaced_by_kube_proxy(self) -> AbstractContextManager[None]:
        """Replace kproxy by kube-proxy for the body of a `with` statement (needs "kube-proxy")."""


class Cluster(Protocol):
    """A cluster with a namespace for one test. Everything that the test creates is deleted afterwards."""

    @property
    def families(self) -> Sequence[IpFamily]:
        """The IP families of Services, the default one first."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The schedulable nodes, at least one."""

    @property
    def proxies(self) -> Proxies:
        """kproxy on the nodes."""

    def lacks(self, need: Need) -> str:
        """Return why the cluster does not meet a requirement, "" if it does."""

    def pod(self, name: str, node: str, labels: Mapping[str, str] = ..., *, host_network: bool = False) -> Pod:
        """Create a pod; return once it is ready. Without labels, it is a client only."""

    def pods(self, name: str, node: str, labels: Mapping[str, str], count: int) -> list[Pod]:
        """Create `count` pods `name-0`, `name-1`... on a node; return once all are ready."""

    def delete_pod(self, pod: Pod, grace: int = 5) -> None:
        """Start deleting a pod. It is terminating and still serves for `grace` seconds. Returns immediately."""

    def make_unready(self, pod: Pod) -> None:
        """Make a pod's readiness probe fail. The pod still answers requests."""

    def apply(self, manifest: Object) -> Object:
        """Create or update an object in the test's namespace; return it as stored by the API server."""

    def get(self, kind: str, name: str) -> Object:
        """Return an object in the test's namespace."""

    def delete(self, kind: str, name: str) -> None:
        """Delete an object in the test's namespace."""

    def set_load_balancer_ip(self, service: str, address: str, ip_mode: Literal["VIP", "Proxy"] = "VIP") -> None:
        """Set the only ingress address in a Service's status (needs "load balancer address")."""

    def request(self, client: Pod, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from a pod one by one, each over a new connection or from a new UDP port."""

    def request_from_outside(self, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from outside the cluster (needs "outside")."""

    def request_from_one_socket(self, client: Pod, address: str, port: int, *, times: int) -> list[Outcome]:
        """Send UDP requests from one socket of a pod. Every call for this address and port uses the same socket."""

    def load(self, client: Pod, address: str, port: int) -> AbstractContextManager[Load]:
        """Send TCP requests continuously, at least some tens per second."""

    def get_from_node(self, node: str, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP GET made on a node, for health checks on its ports."""

    def get_from_pod(self, client: Pod, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP or HTTPS GET made in a pod. Certificates are not verified."""

    def resolve(self, client: Pod, name: str, family: IpFamily, protocol: str = "UDP") -> list[str]:
        """Resolve `service.namespace.svc` from a pod with the cluster's DNS (needs "DNS")."""

    def diagnose(self) -> str:
        """Return a report for people after a failure: proxy logs, Services, EndpointSlices, pods."""
