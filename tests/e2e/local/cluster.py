"""The emulated cluster: one per session, with a Kubernetes namespace for each test."""

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
from tests.e2e.local.balancer import LoadBalancer
from tests.e2e.local.controller import Controller, node_object
from tests.e2e.local.daemons import LocalProxies, NodeProxy
from tests.e2e.local.network import NODES, POD_CIDRS, VERSIONS, Network
from tests.e2e.local.requests import LocalLoad, get, send_from_one_port, send_request
from tests.e2e.local.services import FAMILIES, SERVICE_CIDRS, Allocator
from tests.e2e.local.slices import PodState
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import Host
from tests.lab.waiting import wait_until

GRACE_SECOND = 0.15
"""The real duration, in seconds, of one second of grace. Changes reach every node within 0.1 s here."""

PROBE_TIMEOUT = 0.1
"""Timeout of a readiness probe in seconds."""

ZONES = {node.name: node.zone for node in NODES}


class LocalClusters:
    """The nodes, the API server and kproxy on every node, in a `with` block."""

    def __init__(self, folder: Path, mode: Mode = "nftables") -> None:
        """`folder` is for logs; `mode` is the initial proxy mode."""
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
        """Yield the cluster with a namespace for one test. Everything in it is deleted afterwards."""
        controller = Controller(self._server, name, self._allocator, ZONES)
        cluster = LocalCluster(self._network, self._servers, controller, self._proxies)
        try:
            yield cluster
        finally:
            cluster.close()


class LocalCluster:
    """The cluster as one test sees it."""

    families = FAMILIES
    nodes = NODES

    def __init__(self, network: Network, servers: Servers, controller: Controller, proxies: LocalProxies) -> None:
        self.proxies = proxies
        self._network = network
        self._servers = servers
        self._controller = controller
        self._load_balancer = LoadBalancer(network)
        self._hosts: dict[str, Host] = {}
        self._terminating: dict[str, threading.Timer] = {}
        self._lock = threading.RLock()

    def close(self) -> None:
        """Delete everything that the test created, pods without grace period."""
        with self._lock:
            self._controller.clear()
            self._load_balancer.clear()
            for timer in self._terminating.values():
                timer.cancel()
            for name in list(self._hosts):
                self._end_pod(name)

    def lacks(self, need: Need) -> str:
        """Return why the cluster does not meet a requirement, "" if it does."""
        if need == "SCTP":
            return missing_protocol("SCTP")
        absent: dict[Need, str] = {
            "DNS": "the emulated cluster has no DNS server",
            "kube-proxy": "the emulated cluster has no kube-proxy",
        }
        return absent.get(need, "")

    def pod(self, name: str, node: str, labels: Mapping[str, str] | None = None, *, host_network: bool = False) -> Pod:
        """Create a pod; return once it is ready. Without labels, it is a client only."""
        if host_network:
            addresses = next(each.addresses for each in NODES if each.name == node)
            self._hosts[name] = Host(name, self._network.nodes[node].namespace, tuple(addresses.values()))
            self._controller.put(PodState(name, node, {}, addresses))
            return Pod(name, node, addresses)
        return self._make([name], node, labels or {})[0]

    def pods(self, name: str, node: str, labels: Mapping[str, str], count: int) -> list[Pod]:
        """Create `count` pods `name-0`, `name-1`... on a node; return once all are ready."""
        return self._make([f"{name}-{number}" for number in range(count)], node, labels)

    def delete_pod(self, pod: Pod, grace: int = 5) -> None:
        """Start deleting a pod. It still serves for `grace` times `GRACE_SECOND`. Returns immediately."""
        with self._lock:
            self._controller.change(pod.name, terminating=True)
            timer = threading.Timer(grace * GRACE_SECOND, self._grace_is_over, [pod.name])
            timer.daemon = True
            self._terminating[pod.name] = timer
            timer.start()

    def make_unready(self, pod: Pod) -> None:
        """Make a pod's readiness probe fail. The pod still answers requests."""
        self._controller.change(pod.name, ready=False)

    def apply(self, manifest: Object) -> Object:
        """Create or update an object in the test's namespace; return it as stored by the API server."""
        return self._controller.apply(manifest)

    def get(self, kind: str, name: str) -> Object:
        """Return an object in the test's namespace."""
        return self._controller.get(kind, name)

    def delete(self, kind: str, name: str) -> None:
        """Delete an object in the test's namespace."""
        self._controller.delete(kind, name)

    def set_load_balancer_ip(self, service: str, address: str, ip_mode: Literal["VIP", "Proxy"] = "VIP") -> None:
        """Set the only ingress address in a Service's status."""
        self._controller.set_load_balancer_ip(service, address, ip_mode)

    def request(self, client: Pod, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from a pod one by one, each over a new connection or from a new UDP port."""
        host = self._hosts[client.name]
        return [send_request(host, address, port, protocol) for _ in range(times)]

    def request_from_outside(self, address: str, port: int, protocol: str = "TCP", *, times: int = 1) -> list[Outcome]:
        """Send requests from outside the cluster, through the load balancer."""
        self._load_balancer.update(self._controller.objects("Service"), self._controller.objects("EndpointSlice"))
        return [send_request(self._network.outside, address, port, protocol) for _ in range(times)]

    def request_from_one_socket(self, client: Pod, address: str, port: int, *, times: int) -> list[Outcome]:
        """Send UDP requests from one source port of a pod, the same in every call."""
        return send_from_one_port(self._hosts[client.name], address, port, times)

    def load(self, client: Pod, address: str, port: int) -> LocalLoad:
        """Send TCP requests continuously, at least some tens per second."""
        return LocalLoad(self._hosts[client.name], address, port)

    def get_from_node(self, node: str, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP GET made on a node, for health checks on its ports."""
        return get(self._network.nodes[node], url)

    def get_from_pod(self, client: Pod, url: str) -> tuple[int, str]:
        """Return status and body of an HTTP or HTTPS GET made in a pod. Certificates are not verified."""
        return get(self._hosts[client.name], url)

    def resolve(self, client: Pod, name: str, family: IpFamily, protocol: str = "UDP") -> list[str]:
        """Raise `NotImplementedError`: the cluster has no DNS."""
        raise NotImplementedError(self.lacks("DNS"))

    def diagnose(self) -> str:
        """Return a report for people after a failure: proxy logs, Services, EndpointSlices, pods."""
        return f"{self.proxies.log_tail()}\n--- objects\n{self._controller.diagnose()}"

    def _make(self, names: list[str], node: str, labels: Mapping[str, str]) -> list[Pod]:
        found = []
        for name in names:
            host = self._hosts[name] = self._network.add_pod(name, node)
            self._servers.serve(host, HTTP_PORT)
            self._servers.serve(host, UDP_PORT, "UDP")
            found.append(Pod(name, node, {family: host.address(version) for family, version in VERSIONS.items()}))
        for pod in found:
            wait_until(partial(self._is_ready, pod), f"{pod.name} answers probes from its node")
        self._controller.put(*(PodState(pod.name, node, labels, pod.addresses) for pod in found))
        return found

    def _is_ready(self, pod: Pod) -> bool:
        """Probe as kubelet does. The kernel may need a second until a new link forwards packets."""
        node = self._network.nodes[pod.node]
        outcomes = [send_request(node, address, HTTP_PORT, timeout=PROBE_TIMEOUT) for address in pod.addresses.values()]
        return all(isinstance(outcome, Answer) for outcome in outcomes)

    def _grace_is_over(self, name: str) -> None:
        with self._lock:
            if name in self._hosts:
                self._end_pod(name)
                self._controller.remove(name)

    def _end_pod(self, name: str) -> None:
        host = self._hosts.pop(name)
        self._servers.stop(host)
        self._network.remove_pod(host)
