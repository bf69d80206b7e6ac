"""A stand-in for a dual-stack cluster of kubeadm's, with two nodes and kube-proxy on them, that kubectl can change."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import yaml

from tests.apiserver import Relay
from tests.apiserver.objects import service_cidr
from tests.deploy.kubeadm import config_map
from tests.lab import objects
from tests.lab.connection_stream import Target
from tests.lab.modes import rules_of
from tests.lab.node_pods import NodePods
from tests.lab.proxy import CLUSTER_CIDR
from tests.lab.servers import Servers
from tests.lab.topology import NODE_ADDRESSES, OUTSIDE_ADDRESSES, Host, Lab
from tests.lab.waiting import wait_until
from tests.walk.controllers import DaemonSets
from tests.walk.kubelet import Kubelet
from tests.walk.rbac import ADMIN
from tests.walk.resources import Object
from tests.walk.server import ControlPlane

NODES = {"node-1": NODE_ADDRESSES, "node-2": OUTSIDE_ADDRESSES}
SERVER, SERVER_PORT = "192.0.2.6", 6443
VIPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
PORT, NODE_PORT = 8080, 30080
LIMITS = {"conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "11h0m0s"}}
"""Limits of connection tracking are the whole machine's, which is not a node's to change here."""


class Cluster:
    """Nodes, their kubelets, a control plane, and the Service `web` that kube-proxy serves. Use it in a `with`.

    The lab's `outside`, through which its node reaches everything else, is the second node.
    """

    def __init__(self, folder: Path, mode: str) -> None:
        self._folder, self._mode = folder, mode
        self._stack = ExitStack()
        self.kubelets: list[Kubelet] = []
        self.server = ControlPlane(tls(folder), logs=folder)

    def __enter__(self) -> Cluster:
        with self._stack as stack:
            lab = stack.enter_context(Lab())
            servers = stack.enter_context(Servers())
            self._namespaces = dict(zip(NODES, (lab.node.namespace, lab.outside.namespace), strict=True))
            self._visitor = lab.add_client("visitor", "198.51.100.10", "2001:db8:51::10")
            self._clients = [lab.add_pod(f"client-{n}", *_addresses(n, 250), node=f"node-{n}") for n in (1, 2)]
            self._pods = _pods(lab, servers)
            stack.enter_context(self.server)
            stack.enter_context(Relay(self.server.address, listen=_listen(lab.add_client("server", SERVER))))
            self._create_objects()
            stack.enter_context(DaemonSets(self.server.store))
            for name, namespace in self._namespaces.items():
                self.kubelets.append(Kubelet(name, namespace, self.server.store, self._folder, self._is_awaited))
                stack.enter_context(self.kubelets[-1])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def kubeconfig(self) -> Path:
        """Return the administrator's kubeconfig."""
        return self.server.kubeconfig(self._folder / "admin.conf", token=ADMIN)

    def set_endpoints(self, count: int) -> None:
        """Let the Service have its first `count` pods, and return once the rules of both nodes send to just these."""
        pods = self._pods[:count]
        for version in VIPS:
            endpoints = [objects.endpoint(pod.address(version), _node(pod)) for pod in pods]
            self.server.apply(objects.endpoint_slice("web", endpoints, family=f"IPv{version}", port=PORT))
        wanted = {f"[{each}]:{PORT}" if ":" in each else f"{each}:{PORT}" for pod in pods for each in pod.addresses}

        def are_there() -> bool:
            return all(rules_of(self._mode, each).destinations() == wanted for each in self._namespaces.values())

        wait_until(are_there, f"rules for {wanted} on both nodes")

    def rules(self) -> list[str]:
        """Return what the kernel of each node holds."""
        return [rules_of(self._mode, each).text() for each in self._namespaces.values()]

    def targets(self) -> list[Target]:
        """Return every way to the Service: from pods of both nodes, and from outside by both nodes."""
        inside = [Target("web", client, vip, 80) for client in self._clients for vip in VIPS.values()]
        ports = [Target("web", self._visitor, each, NODE_PORT) for own in NODES.values() for each in own]
        return inside + ports

    def log(self) -> str:
        """Return what the containers of all Pods have said."""
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self._folder.glob("*.log")))

    def _is_awaited(self, pod: str) -> bool:
        watches = (request for request in self.server.requests.all() if request.is_watch)
        return any(each.query.get("fieldSelector") == f"metadata.name={pod}" for each in watches)

    def _create_objects(self) -> None:
        files = config_map(f"https://{SERVER}:{SERVER_PORT}", cluster_cidr=CLUSTER_CIDR, mode=self._mode, **LIMITS)
        configuration = {"name": "kube-proxy", "namespace": "kube-system", "labels": {"app": "kube-proxy"}}
        web = objects.service("web", *VIPS.values(), target_port=PORT, type="NodePort")
        web["spec"]["ports"][0]["nodePort"] = NODE_PORT
        for each in (
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-system"}},
            service_cidr("kubernetes", "10.96.0.0/16", "fd00:10:96::/112"),
            *(node(name, own, control_plane=name == "node-1") for name, own in NODES.items()),
            web,
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": configuration, "data": files},
            *yaml.safe_load_all(Path(__file__).with_name("kube-proxy.yaml").read_text()),
        ):
            self.server.create(each)


def node(name: str, addresses: tuple[str, ...], *, control_plane: bool) -> Object:
    """Return a Node; ordinary Pods do not go to one of the control plane."""
    found = objects.node(name, addresses)
    found["metadata"]["labels"] = {"kubernetes.io/os": "linux"}
    if control_plane:
        found["spec"]["taints"] = [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]
    return found


def tls(folder: Path) -> ssl.SSLContext:
    """Return the server's TLS; the certificate is left in `folder`."""
    names = f"subjectAltName=IP:{SERVER},IP:127.0.0.1"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=kube-apiserver", "-addext", names]
    command += ["-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt")]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context


def _pods(lab: Lab, servers: Servers) -> list[Host]:
    """Return the pods of the Service, which answer: in turn on both nodes."""
    places = [(number % 2 + 1, number + 1) for number in range(3)]
    machines = {
        node: NodePods(lab, f"node-{node}", [a for place in places if place[0] == node for a in _addresses(*place)])
        for node in (1, 2)
    }
    pods = [machines[node].pod(f"web/{number}", *_addresses(node, number)) for node, number in places]
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
