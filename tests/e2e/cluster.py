"""What the end-to-end tests need of a cluster. `real` is one by KUBECONFIG, `local` one of network namespaces here.

A test says what it needs of the cluster with `@needs(...)`; where the cluster cannot do it, the test is skipped with
the reason that `Cluster.lacks` gives. Objects are Kubernetes objects as dictionaries, in the test's own namespace.
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
"""What some clusters lack. "outside": a client that is neither a pod nor a node that proxies."""

HTTP_PORT = 8080
UDP_PORT = 8081


class Node(msgspec.Struct, frozen=True):
    """A node that pods can be put on. `addresses` are its InternalIPs, `zone` is "" where it has none."""

    name: str
    addresses: Mapping[IpFamily, str]
    zone: str = ""


class Pod(msgspec.Struct, frozen=True):
    """A pod that runs. It answers over HTTP on `HTTP_PORT`, named `http`, and over UDP on `UDP_PORT`, named `udp`.

    A pod without labels, or in the node's own network, is a client only.
    """

    name: str
    node: str
    addresses: Mapping[IpFamily, str]


class Answer(msgspec.Struct, frozen=True):
    """What came back: the name of the pod that answered, and the client address that it saw."""

    pod: str
    client: str


class Failure(msgspec.Struct, frozen=True):
    """Nothing came back. `kind`: refused by a reset or an ICMP error, or no answer in time."""

    kind: Literal["refused", "no answer", "other"]
    detail: str


Outcome = Answer | Failure


class Load(Protocol):
    """Requests one after the other, from a pod, each over a connection of its own, while its `with` lasts."""

    @property
    def answers(self) -> int:
        """How many requests have been answered so far."""

    def failures(self) -> Sequence[str]:
        """Return what was wrong with each request that failed so far, with its time."""


class Proxies(Protocol):
    """kproxy on the cluster's nodes."""

    def mode(self) -> Mode:
        """Return the mode that the nodes are in."""

    def restart(self, node: str) -> None:
        """End the proxy of a node as an upgrade does; return once a new one serves."""

    def kill(self, node: str) -> None:
        """Kill the proxy of a node with SIGKILL; return once a new one serves."""

    def in_mode(self, mode: Mode) -> AbstractContextManager[None]:
        """Move all nodes to a mode, and back at the end; the body runs once every node is in it."""

    def replaced_by_kube_proxy(self) -> AbstractContextManager[None]:
        """Let kube-proxy run in kproxy's place, and kproxy again at the end (needs "kube-proxy")."""


class Cluster(Protocol):
    """A cluster, and the namespace of one test in it. What a test makes is gone after it."""

    @property
    def families(self) -> Sequence[IpFamily]:
        """The IP families of Services, the default one first."""

    @property
    def nodes(self) -> Sequence[Node]:
        """Nodes that take pods, at least one."""

    @property
    def proxies(self) -> Proxies:
        """kproxy on the nodes."""

    def lacks(self, need: Need) -> str:
        """Return why the cluster cannot do something, "" if it can."""

    def pod(self, name: str, node: str, labels: Mapping[str, str] = ..., *, host_network: bool = False) -> Pod:
        """Make a pod; return once it is ready. Without labels it is a client only."""

    def pods(self, name: str, node: str, labels: Mapping[str, str], count: int) -> list[Pod]:
        """Make `count` pods `name-0`, `name-1`... on a node at once; return once all are ready."""

    def delete_pod(self, pod: Pod, grace: int = 5) -> None:
        """Begin to delete a pod: it is terminating and serves for `grace` seconds, then it ends. Does not wait."""

    def make_unready(self, pod: Pod) -> None:
        """Let a pod's readiness probe fail, though it goes on answering."""

    def apply(self, manifest: Object) -> Object:
        """Create or update an object of the test's namespace; return it as the API server has it."""

    def get(self, kind: str, name: str) -> Object:
        """Return an object of the test's namespace."""

    def delete(self, kind: str, name: str) -> None:
        """Delete an object of the test's namespace."""

    def give_address(self, service: str, address: str, ip_mode: Literal["VIP", "Proxy"] = "VIP") -> None:
        """Write a load balancer's address into a Service's status, its only one (needs "load balancer address")."""

    def ask(self, client: Pod, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from a pod, one after the other, each over a connection or from a port of its own."""

    def ask_from_outside(self, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from outside the cluster (needs "outside")."""

    def ask_from_one_socket(self, client: Pod, address: str, port: int, *, times: int) -> list[Outcome]:
        """Send UDP requests from one socket of a pod: the same in every call for this address and port."""

    def load(self, client: Pod, address: str, port: int) -> AbstractContextManager[Load]:
        """Send requests over TCP without end, at least some tens a second."""

    def get_from_node(self, node: str, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP GET made on a node itself, for health checks on its ports."""

    def get_from_pod(self, client: Pod, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP or HTTPS GET made in a pod; no certificate is checked."""

    def resolve(self, client: Pod, name: str, family: IpFamily, protocol: str = "UDP") -> list[str]:
        """Return the addresses of a name `service.namespace.svc`, asked of the cluster's DNS by a pod (needs "DNS")."""

    def diagnose(self) -> str:
        """Return what a human needs after a failure: the proxies' last log lines, Services, slices, pods."""
