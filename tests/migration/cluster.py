"""A stand-in for a dual-stack kubeadm cluster with two nodes and kube-proxy, which kubectl can change."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import yaml

from tests.apiserver import Relay
from tests.apiserver.objects import service_cidr
from tests.deploy.kubeadm import CONNTRACK, config_map
from tests.deploy.tls import server_tls
from tests.lab import objects
from tests.lab.connection_stream import Target
from tests.lab.modes import rules_of
from tests.lab.node_pods import NodePods
from tests.lab.proxy import CLUSTER_CIDR
from tests.lab.servers import Servers
from tests.lab.topology import NODE_ADDRESSES, OUTSIDE_ADDRESSES, Host, Lab
from tests.lab.waiting import wait_until
from tests.migration.controllers import DaemonSets
from tests.migration.kubelet import Kubelet
from tests.migration.rbac import ADMIN
from tests.migration.resources import Object
from tests.migration.server import ControlPlane

NODES = {"node-1": NODE_ADDRESSES, "node-2": OUTSIDE_ADDRESSES}
SERVER, SERVER_PORT = "192.0.2.6", 6443
VIPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
PORT, NODE_PORT = 8080, 30080


class Cluster:
    """Two nodes with kubelets, a control plane, and the Service `web`. Use it as a context manager.

    The second node is the host `outside` of the lab, which also routes between the first node and everything else.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self._folder, self._mode = folder, mode
        self._stack = ExitStack()
        self.kubelets: list[Kubelet] = []
        self.server = ControlPlane(server_tls(folder, SERVER, "127.0.0.1"), logs=folder)

    def __enter__(self) -> Cluster:
        with self._stack as stack:
            lab = stack.enter_context(Lab())
            servers = stack.enter_context(Servers())
            self._namespaces = dict(zip(NODES, (lab.node.namespace, lab.outside.namespace), strict=True))
            self._external_client = lab.add_client("external", "198.51.100.10", "2001:db8:51::10")
            self._clients = [lab.add_pod(f"client-{n}", *_addresses(n, 250), node=f"node-{n}") for n in (1, 2)]
            self._pods = _pods(lab, servers)
            stack.enter_context(self.server)
            stack.enter_context(Relay(self.server.address, listen=_listen(lab.add_client("server", SERVER))))
            self._create_objects()
            stack.enter_context(DaemonSets(self.server.store))
            for name, namespace in self._namespaces.items():
                self.kubelets.append(Kubelet(name, namespace, self.server.store, self._folder, self._is_watched))
                stack.enter_context(self.kubelets[-1])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def kubeconfig(self) -> Path:
        """Write and return the administrator's kubeconfig."""
        return self.server.kubeconfig(self._folder / "admin.conf", token=ADMIN)

    def set_endpoints(self, count: int) -> None:
        """Make the first `count` pods the endpoints of the Service; wait until the rules of both nodes match."""
        pods = self._pods[:count]
        for version in VIPS:
            endpoints = [objects.endpoint(pod.address(version), _node(pod)) for pod in pods]
            self.server.apply(objects.endpoint_slice("web", endpoints, family=f"IPv{version}", port=PORT))
        expected = {f"[{each}]:{PORT}" if ":" in each else f"{each}:{PORT}" for pod in pods for each in pod.addresses}

        def is_programmed() -> bool:
            return all(rules_of(self._mode, each).destinations() == expected for each in self._namespaces.values())

        wait_until(is_programmed, f"rules for {expected} on both nodes")

    def rules(self) -> list[str]:
        """Return the rule set of each node."""
        return [rules_of(self._mode, each).text() for each in self._namespaces.values()]

    def targets(self) -> list[Target]:
        """Return all targets of requests: cluster IPs from pods on both nodes, NodePorts of both from outside."""
        cluster_ips = [Target("web", client, vip, 80) for client in self._clients for vip in VIPS.values()]
        node_ports = [
            Target("web", self._external_client, address, NODE_PORT)
            for addresses in NODES.values()
            for address in addresses
        ]
        return cluster_ips + node_ports

    def log(self) -> str:
        """Return the logs of all Pods."""
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self._folder.glob("*.log")))

    def _is_watched(self, pod: str) -> bool:
        watches = (request for request in self.server.requests.all() if request.is_watch)
        return any(each.query.get("fieldSelector") == f"metadata.name={pod}" for each in watches)

    def _create_objects(self) -> None:
        files = config_map(
            f"https://{SERVER}:{SERVER_PORT}", cluster_cidr=CLUSTER_CIDR, mode=self._mode, conntrack=CONNTRACK
        )
        configuration = {"name": "kube-proxy", "namespace": "kube-system", "labels": {"app": "kube-proxy"}}
        web = objects.service("web", *VIPS.values(), target_port=PORT, type="NodePort")
        web["spec"]["ports"][0]["nodePort"] = NODE_PORT
        for each in (
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}},
            service_cidr("kubernetes", "10.96.0.0/16", "fd00:10:96::/112"),
            *(node(name, addresses, control_plane=name == "node-1") for name, addresses in NODES.items()),
            web,
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": configuration, "data": files},
            *yaml.safe_load_all(Path(__file__).with_name("kube-proxy.yaml").read_text()),
        ):
            self.server.create(each)


def node(name: str, addresses: tuple[str, ...], *, control_plane: bool) -> Object:
    """Return a Node. A control plane node has the usual taint."""
    body = objects.node(name, addresses)
    body["metadata"]["labels"] = {"kubernetes.io/os": "linux"}
    if control_plane:
        body["spec"]["taints"] = [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]
    return body


def _pods(lab: Lab, servers: Servers) -> list[Host]:
    """Start the server pods of the Service, alternating between the nodes."""
    positions = [(number % 2 + 1, number + 1) for number in range(3)]
    machines = {
        node: NodePods(
            lab,
            f"node-{node}",
            [each for position in positions if position[0] == node for each in _addresses(*position)],
        )
        for node in (1, 2)
    }
    pods = [machines[node].pod(f"web/{number}", *_addresses(node, number)) for node, number in positions]
    for pod in pods:
        servers.serve(pod, PORT)
    return pods


def _addresses(node: int, number: int) -> tuple[str, str]:
    return f"10.244.{node}.{number}", f"fd00:10:244:{node}::{number:x}"


def _node(pod: Host) -> str:
    return f"node-{pod.address().split('.')[2]}"


def _listen(host: Host) -> Callable[[int], socket.socket]:
    def listen(_port: int) -> socket.socket:
        return host.namespace.call(lambda: socket.create_server((SERVER, SERVER_PORT), backlog=64))

    return listen
