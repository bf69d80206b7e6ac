"""The cluster of namespaces: one for a session, with a namespace of Kubernetes for each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Self

from tests.apiserver import ApiServer
from tests.apiserver.objects import service_cidr
from tests.e2e.cluster import HTTP_PORT, UDP_PORT, Answer, IpFamily, Mode, Need, Object, Outcome, Pod
from tests.e2e.local.asking import Requests, ask, ask_from_one_port, get
from tests.e2e.local.balancer import Balancer
from tests.e2e.local.controller import Controller, node_object
from tests.e2e.local.daemons import LocalProxies, NodeProxy
from tests.e2e.local.network import NODES, POD_CIDRS, VERSIONS, Network
from tests.e2e.local.services import FAMILIES, SERVICE_CIDRS, Allocator
from tests.e2e.local.slices import PodState
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import Host
from tests.lab.waiting import wait_until

SECOND = 0.15
"""Seconds that a second of grace lasts here, where changes reach every node in a tenth of one."""

PROBE = 0.1
"""Seconds that a readiness probe waits for its answer."""

ZONES = {node.name: node.zone for node in NODES}


class LocalClusters:
    """The nodes, the API server and kproxy on every node, for as long as its `with` lasts."""

    def __init__(self, folder: Path, mode: Mode = "nftables") -> None:
        """`folder` is for logs, `mode` the one that kproxy begins in."""
        self._folder = folder
        self._mode = mode
        self._allocator = Allocator()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._network = Network()
            stack.callback(self._network.close)
            self._servers = stack.enter_context(Servers())
            self._server = stack.enter_context(ApiServer())
            self._server.create(service_cidr("kubernetes", *SERVICE_CIDRS.values()))
            for node in NODES:
                self._server.create(node_object(node, POD_CIDRS[node.name]))
            proxies: dict[str, NodeProxy] = {}
            for name, host in self._network.nodes.items():
                proxies[name] = NodeProxy(host, self._server, self._folder)
                stack.callback(proxies[name].close)
            self._proxies = LocalProxies(proxies, self._mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def test(self, name: str) -> Iterator[LocalCluster]:
        """Give a test a namespace of this name; what it has made is gone at the end."""
        controller = Controller(self._server, name, self._allocator, ZONES)
        cluster = LocalCluster(self._network, self._servers, controller, self._proxies)
        try:
            yield cluster
        finally:
            cluster.close()


class LocalCluster:
    """What one test sees of the cluster."""

    families = FAMILIES
    nodes = NODES

    def __init__(self, network: Network, servers: Servers, controller: Controller, proxies: LocalProxies) -> None:
        self.proxies = proxies
        self._network = network
        self._servers = servers
        self._controller = controller
        self._balancer = Balancer(network)
        self._hosts: dict[str, Host] = {}
        self._leaving: dict[str, threading.Timer] = {}
        self._lock = threading.RLock()

    def close(self) -> None:
        """Delete what the test has made, pods without any grace."""
        with self._lock:
            self._controller.clear()
            self._balancer.clear()
            for timer in self._leaving.values():
                timer.cancel()
            for name in list(self._hosts):
                self._end_pod(name)

    def lacks(self, need: Need) -> str:
        """Return why the cluster cannot do something, "" if it can."""
        if need == "SCTP":
            return missing_protocol("SCTP")
        absent: dict[Need, str] = {
            "DNS": "no DNS server in a cluster of namespaces",
            "kube-proxy": "no kube-proxy in a cluster of namespaces",
        }
        return absent.get(need, "")

    def pod(self, name: str, node: str, labels: Mapping[str, str] | None = None, *, host_network: bool = False) -> Pod:
        """Make a pod; return once it is ready. Without labels it is a client only."""
        if host_network:
            addresses = next(each.addresses for each in NODES if each.name == node)
            self._hosts[name] = Host(name, self._network.nodes[node].namespace, tuple(addresses.values()))
            self._controller.put(PodState(name, node, {}, addresses))
            return Pod(name, node, addresses)
        return self._make([name], node, labels or {})[0]

    def pods(self, name: str, node: str, labels: Mapping[str, str], count: int) -> list[Pod]:
        """Make `count` pods `name-0`, `name-1`... on a node at once; return once all are ready."""
        return self._make([f"{name}-{number}" for number in range(count)], node, labels)

    def delete_pod(self, pod: Pod, grace: int = 5) -> None:
        """Begin to delete a pod: it is terminating, serves for `grace` times `SECOND`, then ends. Does not wait."""
        with self._lock:
            self._controller.change(pod.name, terminating=True)
            timer = threading.Timer(grace * SECOND, self._end_of_grace, [pod.name])
            timer.daemon = True
            self._leaving[pod.name] = timer
            timer.start()

    def make_unready(self, pod: Pod) -> None:
        """Let a pod's readiness probe fail, though it goes on answering."""
        self._controller.change(pod.name, ready=False)

    def apply(self, manifest: Object) -> Object:
        """Create or update an object of the test's namespace; return it as the API server has it."""
        return self._controller.apply(manifest)

    def get(self, kind: str, name: str) -> Object:
        """Return an object of the test's namespace."""
        return self._controller.get(kind, name)

    def delete(self, kind: str, name: str) -> None:
        """Delete an object of the test's namespace."""
        self._controller.delete(kind, name)

    def give_address(self, service: str, address: str, ip_mode: Literal["VIP", "Proxy"] = "VIP") -> None:
        """Write a load balancer's address into a Service's status, its only one."""
        self._controller.give_address(service, address, ip_mode)

    def ask(self, client: Pod, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from a pod, one after the other, each over a connection or from a port of its own."""
        host = self._hosts[client.name]
        return [ask(host, address, port, protocol) for _ in range(times)]

    def ask_from_outside(self, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from outside the cluster, over what knows where its load balancers' addresses are."""
        self._balancer.learn(self._controller.objects("Service"), self._controller.objects("EndpointSlice"))
        return [ask(self._network.outside, address, port, protocol) for _ in range(times)]

    def ask_from_one_socket(self, client: Pod, address: str, port: int, *, times: int) -> list[Outcome]:
        """Send UDP requests from one socket of a pod: the same in every call for this address and port."""
        return ask_from_one_port(self._hosts[client.name], address, port, times)

    def load(self, client: Pod, address: str, port: int) -> Requests:
        """Send requests over TCP without end, at least some tens a second."""
        return Requests(self._hosts[client.name], address, port)

    def get_from_node(self, node: str, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP GET made on a node itself, for health checks on its ports."""
        return get(self._network.nodes[node], url)

    def get_from_pod(self, client: Pod, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP or HTTPS GET made in a pod; no certificate is checked."""
        return get(self._hosts[client.name], url)

    def resolve(self, client: Pod, name: str, family: IpFamily, protocol: str = "UDP") -> list[str]:
        """Raise: the cluster has no DNS."""
        raise NotImplementedError(self.lacks("DNS"))

    def diagnose(self) -> str:
        """Return what a human needs after a failure: the proxies' last log lines, Services, slices, pods."""
        return f"{self.proxies.words()}\n--- objects\n{self._controller.diagnose()}"

    def _make(self, names: list[str], node: str, labels: Mapping[str, str]) -> list[Pod]:
        found = []
        for name in names:
            host = self._hosts[name] = self._network.add_pod(name, node)
            self._servers.serve(host, HTTP_PORT)
            self._servers.serve(host, UDP_PORT, "UDP")
            found.append(Pod(name, node, {family: host.address(version) for family, version in VERSIONS.items()}))
        for pod in found:
            wait_until(partial(self._is_ready, pod), f"{pod.name} answers its node")
        self._controller.put(*(PodState(pod.name, node, labels, pod.addresses) for pod in found))
        return found

    def _is_ready(self, pod: Pod) -> bool:
        """Probe as kubelet does. The kernel may need a second until packets pass over a new link."""
        node = self._network.nodes[pod.node]
        outcomes = [ask(node, address, HTTP_PORT, patience=PROBE) for address in pod.addresses.values()]
        return all(isinstance(outcome, Answer) for outcome in outcomes)

    def _end_of_grace(self, name: str) -> None:
        with self._lock:
            if name in self._hosts:
                self._end_pod(name)
                self._controller.remove(name)

    def _end_pod(self, name: str) -> None:
        host = self._hosts.pop(name)
        self._servers.stop(host)
        self._network.remove_pod(host)
