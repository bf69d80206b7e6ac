"""A node for the daemon: a network namespace that reaches the API server only through a relay."""

from __future__ import annotations

import signal
import socket
import struct
import sys
from functools import partial
from pathlib import Path
from subprocess import Popen

from kproxy.app.family_contexts import make_context
from kproxy.config import Config
from kproxy.iptables.backend import IptablesPrinter
from kproxy.kube.client.client import ApiClient
from kproxy.kube.codec.conversion import DecodedObject
from kproxy.kube.codec.json_codec import read_page
from kproxy.model.context import Context
from kproxy.model.delta import Kind, Replace
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Family, Node, Service
from kproxy.sync.family_sync import FamilySync
from tests.api.conftest import Cluster
from tests.apiserver import Relay
from tests.fakekernel import FakeKernel
from tests.lab.namespace import Namespace
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.recordings import State, comparable

KPROXY = str(Path(sys.executable).with_name("kproxy"))
CONFIG = Config(cluster_cidr="10.244.0.0/16,fd00:10:244::/48", hostname_override="node-1")
FLAGS = (
    "--hostname-override=node-1",
    f"--cluster-cidr={CONFIG.cluster_cidr}",
    "--conntrack-max-per-core=0",
    "--conntrack-min=0",
)
PATHS: dict[Kind, str] = {
    Service: "/api/v1/services",
    EndpointSlice: "/apis/discovery.k8s.io/v1/endpointslices",
    Node: "/api/v1/nodes",
}


class NodeDaemon:
    """`kproxy run` on its own node. It reaches the API server through a relay that can break."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._folder = folder
        self._processes: list[Popen[str]] = []
        self.namespace = Namespace("node-1")
        self.namespace.run(["ip", "link", "set", "lo", "up"])
        self.relay = Relay(cluster.address, listen=self._listen)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(HANG_GUARD)
        self.relay.refuse()
        self.relay.resume()
        self.namespace.close()

    def start(self, *flags: str) -> Popen[str]:
        """Start a daemon."""
        kubeconfig = self._cluster.kubeconfig(self._folder / "node.kubeconfig", port=self.relay.port)
        with (self._folder / "kproxy.log").open("a") as log:
            command = [KPROXY, "run", f"--kubeconfig={kubeconfig}", *FLAGS, *flags]
            process = self.namespace.popen(command, log)
        self._processes.append(process)
        return process

    def stop(self, process: Popen[str], number: int = signal.SIGTERM) -> int:
        """Stop a daemon with a signal; return its exit code."""
        process.send_signal(number)
        return process.wait(HANG_GUARD)

    def log(self) -> str:
        return (self._folder / "kproxy.log").read_text()

    def rules(self) -> dict[Family, State]:
        """Return the rules in the kernel."""
        programs = {Family.IPV4: "iptables-save", Family.IPV6: "ip6tables-save"}
        return {
            family: comparable(self.namespace.run([program]).stdout.splitlines())
            for family, program in programs.items()
        }

    def expected_rules(self) -> dict[Family, State]:
        """Return the rules for the server's current objects, rendered in this process."""
        store = self._listed()
        states = {}
        for family in Family:
            kernel = FakeKernel()
            context = partial(_context, family)
            FamilySync(IptablesPrinter(kernel.restore), context).sync(store)
            states[family] = comparable(kernel.dump())
        return states

    def settle(self) -> None:
        """Wait until the kernel has the rules for the server's current objects."""
        expected = self.expected_rules()
        wait_until(lambda: self.rules() == expected, "the rules for the API server's objects")

    def generation(self) -> int:
        """Return the node's nf_tables generation. Every commit of any process increments it."""
        return self.namespace.call(_generation)

    def _listed(self) -> Store:
        kubeconfig = self._cluster.kubeconfig(self._folder / "direct.kubeconfig")
        client = ApiClient.from_config(str(kubeconfig))
        store = Store("node-1")
        for kind, path in PATHS.items():
            with client.get(path, {}, HANG_GUARD) as response:
                page = read_page(kind, response.read())
            objects = (item.object for item in page.items if isinstance(item, DecodedObject))
            store.apply(Replace(kind, tuple(item for item in objects if item is not None)))
        client.close()
        return store

    def _listen(self, port: int) -> socket.socket:
        return self.namespace.call(lambda: socket.create_server(("127.0.0.1", port), backlog=64))


def _context(family: Family, node: Node | None) -> Context:
    return make_context(CONFIG, family, "node-1", node, (), accounting=True, random_fully=True)


def _generation() -> int:
    """Send NFT_MSG_GETGEN. The first attribute of the answer is the number (linux/netfilter/nf_tables.h)."""
    subsystem, get_generation, request = 10 << 8, 16, 1
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.send(struct.pack("=IHHII4x", 20, subsystem | get_generation, request, 1, 0))
        answer = netlink.recv(4096)
    return int.from_bytes(answer[24:28], "big")
