"""NodePorts on 127.0.0.1 and ::1 in nftables mode: who reaches what, in every order of restarts (KEP-6032)."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects, proxy
from tests.lab.client import Answered, Refused, TimedOut, send_request
from tests.lab.modes import NftablesRules, mode_flag
from tests.lab.namespace import Namespace
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import HANG_GUARD, wait_until
from tests.lab.web_service import CLUSTER_IPS, DROP_TIMEOUT, FAMILIES, NODE_PORT

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
RANGES = "--nodeport-addresses=127.0.0.0/8,::1/128,10.99.0.0/24,fd00:99::/64"
GATE = "--feature-gates=KubeProxyNFTablesLocalhostNodePorts"
SETTINGS = {"default": (), "loopback": (RANGES,), "loopback, gate off": (RANGES, f"{GATE}=false")}
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture
def pods(lab: Lab, servers: Servers) -> list[Host]:
    found = [lab.add_pod(f"pod-{number}", f"10.244.1.{number}", f"fd00:10:244:1::{number}") for number in (1, 2)]
    for pod in found:
        for protocol in ("TCP", "UDP"):
            servers.serve(pod, 8080, protocol)
    return found


def web(pods: Sequence[Host], **spec: Any) -> list[objects.Object]:
    """Return a Service with a NodePort for TCP and one for UDP, with the same number, and its EndpointSlices."""
    found = objects.service("web", *CLUSTER_IPS.values(), type="NodePort", **spec)
    found["spec"]["ports"] = [
        {"name": name, "protocol": protocol, "port": 80, "targetPort": 8080, "nodePort": NODE_PORT}
        for name, protocol in (("main", "TCP"), ("datagrams", "UDP"))
    ]
    slices = []
    for version, family in FAMILIES.items():
        each = objects.endpoint_slice("web", [objects.endpoint(pod.address(version)) for pod in pods], family=family)
        each["ports"].append({"name": "datagrams", "protocol": "UDP", "port": 8080})
        slices.append(each)
    return [objects.node(), found, *slices]


class Daemons:
    """Runs one daemon after another with the same objects."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab = lab
        self._folder = folder
        self.objects = folder / "objects"
        self.objects.mkdir()
        self._number = 0

    def write(self, found: Sequence[objects.Object]) -> None:
        objects.write(self.objects / "web.yaml", found)

    def run(self, *flags: str) -> proxy.Daemon:
        self._number += 1
        self.log = self._folder / f"kproxy-{self._number}.log"
        return proxy.Daemon(self._lab, self.objects, self.log, mode_flag("nftables"), *flags)


@pytest.fixture
def daemons(lab: Lab, tmp_path: Path, nft: None) -> Daemons:
    return Daemons(lab, tmp_path)


def metrics(node: Namespace) -> dict[str, float]:
    text = node.run(["curl", "--silent", "http://127.0.0.1:10249/metrics"]).stdout
    lines = [line for line in text.splitlines() if line.startswith("kubeproxy_nftables_localhost_nodeport")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def metric(name: str, version: int, **labels: str) -> str:
    found = "".join(f',{key}="{value}"' for key, value in labels.items())
    return f'kubeproxy_nftables_localhost_nodeport_{name}{{ip_family="{FAMILIES[version]}"{found}}}'


def test_node_reaches_pods_through_loopback(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web(pods))
    node = lab.node
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        for version, address in LOOPBACK.items():
            answers = {send_request(node, address, NODE_PORT) for _ in range(40)}
            assert answers == {Answered(pod.name, node.address(version)) for pod in pods}
            before = metrics(node.namespace)[metric("rejected_packets_total", version, protocol="UDP")]
            assert send_request(node, address, NODE_PORT, "UDP") == Refused()
            after = metrics(node.namespace)
            assert after[metric("rejected_packets_total", version, protocol="UDP")] == before + 1
            assert after[metric("rejected_packets_total", version, protocol="TCP")] == 0
            assert after[metric("listeners", version)] == 1
            assert after[metric("listener_creation_failures_total", version)] == 0
        # Listeners are open on exactly these addresses.
        assert send_request(node, "127.0.0.2", NODE_PORT) == Refused()
        for pod in pods:  # has its own loopback interface
            assert send_request(pod, "127.0.0.1", NODE_PORT) == Refused()
            assert send_request(pod, "::1", NODE_PORT) == Refused()


@VERSIONS
def test_by_default_everything_is_rejected(lab: Lab, pods: list[Host], daemons: Daemons, version: int) -> None:
    node, address = lab.node, LOOPBACK[version]
    daemons.write(web(pods))
    with daemons.run() as daemon:
        daemon.wait_until_synced()
        with node.namespace.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_STREAM) as program:
            program.bind((address, NODE_PORT))
            program.listen()
            assert send_request(node, address, NODE_PORT) == Refused()
        assert send_request(node, address, NODE_PORT, "UDP") == Refused()
        found = metrics(node.namespace)
        rejected = {
            protocol: found[metric("rejected_packets_total", version, protocol=protocol)]
            for protocol in ("TCP", "UDP", "SCTP")
        }
        assert rejected == {"TCP": 1, "UDP": 1, "SCTP": 0}
        assert metric("listeners", version) not in found


def test_without_the_gate_programs_of_the_host_are_reached(
    lab: Lab, pods: list[Host], daemons: Daemons, servers: Servers
) -> None:
    servers.serve(Host("program", lab.node.namespace, ("127.0.0.1", "::1")), NODE_PORT)
    daemons.write(web(pods))
    with daemons.run(RANGES, f"{GATE}=false") as daemon:
        daemon.wait_until_synced()
        for address in LOOPBACK.values():
            assert send_request(lab.node, address, NODE_PORT) == Answered("program", address)
        assert not metrics(lab.node.namespace)


def test_one_family_only(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web(pods))
    with daemons.run("--nodeport-addresses=127.0.0.1/32") as daemon:
        daemon.wait_until_synced()
        assert isinstance(send_request(lab.node, "127.0.0.1", NODE_PORT), Answered)
        assert send_request(lab.node, "::1", NODE_PORT) == Refused()
        assert "unreachable" not in daemons.log.read_text()


@pytest.fixture
def neighbor(lab: Lab, pods: list[Host]) -> Host:
    """A pod whose route to 127.0.0.1 is this node. The node has `route_localnet`, as after iptables mode."""
    lab.node.namespace.sysctl(ipv4__conf__all__route_localnet=1)
    pod = pods[0].namespace
    pod.sysctl(ipv4__conf__all__route_localnet=1)
    pod.run(["ip", "address", "delete", "127.0.0.1/8", "dev", "lo"])
    link = pod.run(["ip", "route", "get", "8.8.8.8"]).stdout.split()
    route = link[link.index("via") + 1 : link.index("dev") + 2] if "via" in link else link[link.index("dev") :][:2]
    pod.run(["ip", "route", "add", "127.0.0.1", *(["via", *route] if "via" in link else route)])
    return pods[0]


def test_pods_do_not_reach_the_loopback_address_of_the_node(
    lab: Lab, pods: list[Host], daemons: Daemons, servers: Servers, neighbor: Host
) -> None:
    daemons.write(web(pods[1:]))
    program = Host("program", lab.node.namespace, ("127.0.0.1",))
    servers.serve(program, NODE_PORT)
    with daemons.run(RANGES, f"{GATE}=false") as daemon:
        daemon.wait_until_synced()
        assert send_request(neighbor, "127.0.0.1", NODE_PORT) == Answered("program", neighbor.address())
    servers.stop(program)
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()

        def answers() -> bool:  # not at once, if the program has not yet closed the port when kproxy tries to open it
            return isinstance(send_request(lab.node, "127.0.0.1", NODE_PORT), Answered)

        wait_until(answers, "an answer through the loopback address")
        assert send_request(neighbor, "127.0.0.1", NODE_PORT, timeout=DROP_TIMEOUT) == TimedOut()


@pytest.mark.parametrize("order", [*permutations(SETTINGS)], ids=", ".join)
def test_every_order_of_restarts(lab: Lab, pods: list[Host], daemons: Daemons, order: tuple[str, ...]) -> None:
    daemons.write(web(pods))
    expected = {"default": (Refused(), Refused()), "loopback, gate off": (Refused(), Refused())}
    for setting in (*order, order[0]):
        with daemons.run(*SETTINGS[setting]) as daemon:
            daemon.wait_until_synced()
            for address in LOOPBACK.values():
                outcomes = tuple(send_request(lab.node, address, NODE_PORT, each) for each in ("TCP", "UDP"))
                if setting == "loopback":
                    assert isinstance(outcomes[0], Answered)
                    assert outcomes[1] == Refused()
                else:
                    assert outcomes == expected[setting]
            found = {element for _, name, element in rules_elements(lab) if name == "localhost-nodeports"}
            verdicts = {each for each in ("localhost-proxy", "localhost-reject") if any(each in one for one in found)}
            assert verdicts == VERDICTS[setting]


COUNTER = "localhost-nodeport-rejected-udp"
VERDICTS = {
    "default": {"localhost-reject"},
    "loopback": {"localhost-proxy", "localhost-reject"},
    "loopback, gate off": set(),
}


def rules_elements(lab: Lab) -> set[tuple[str, str, str]]:
    return NftablesRules(lab.node.namespace).elements()


def test_connections_wait_while_kproxy_does_not_run(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web(pods))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        daemon.kill()
    for address in LOOPBACK.values():
        assert send_request(lab.node, address, NODE_PORT, timeout=DROP_TIMEOUT) == TimedOut()
    # A program that listens there by now is reached.
    with lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as program:
        program.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        program.bind(("", NODE_PORT))
        program.listen()
        with lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(DROP_TIMEOUT)
            client.connect(("127.0.0.1", NODE_PORT))
    lab.node.namespace.run([proxy.KPROXY, "run", "--cleanup"])
    for address in LOOPBACK.values():
        assert send_request(lab.node, address, NODE_PORT) == Refused()


def test_closed_connections_do_not_hold_up_new_ones(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    """The server closes first, so kproxy's socket stays in TIME_WAIT while the client's port is free again."""
    daemons.write(web(pods))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        waiting = ["ss", "-tanH", "state", "time-wait", f"( sport = :{NODE_PORT} and dport = :40000 )"]
        for _ in range(3):
            with lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(("127.0.0.1", 40_000))
                client.settimeout(HANG_GUARD)
                client.connect(("127.0.0.1", NODE_PORT))
                info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                assert info[100:104] == bytes(4), "retransmissions"
                client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
                while client.recv(1000):
                    pass
            wait_until(lambda: bool(lab.node.namespace.run(waiting).stdout), "kproxy's socket is in TIME_WAIT")


@pytest.mark.parametrize("policy", ["none here", "one here"])
def test_policy_local_uses_only_endpoints_of_this_node(
    lab: Lab, pods: list[Host], daemons: Daemons, policy: str
) -> None:
    found = web(pods, externalTrafficPolicy="Local")
    for each in found[2:]:
        for number, one in enumerate(each["endpoints"]):
            one["nodeName"] = "node-1" if number == 0 and policy == "one here" else "node-2"
    daemons.write(found)
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        for version, address in LOOPBACK.items():
            outcomes = {send_request(lab.node, address, NODE_PORT) for _ in range(10)}
            here = Answered(pods[0].name, lab.node.address(version))
            assert outcomes == ({here} if policy == "one here" else {Refused()})


def test_listeners_follow_the_endpoints(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web([]))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        assert send_request(lab.node, "127.0.0.1", NODE_PORT) == Refused()
        daemons.write(web(pods[:1]))
        wait_until(lambda: metrics(lab.node.namespace)[metric("listeners", 6)] == 1, "a listener is open")
        answer = Answered(pods[0].name, lab.node.address())
        wait_until(lambda: send_request(lab.node, "127.0.0.1", NODE_PORT) == answer, "the pod answers")
        daemons.write([objects.node()])
        wait_until(lambda: metrics(lab.node.namespace)[metric("listeners", 4)] == 0, "no listener is open")
        assert send_request(lab.node, "127.0.0.1", NODE_PORT) == Refused()


def test_port_of_another_program(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    program = lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
    program.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else the kernel keeps the port for a minute
    program.bind(("127.0.0.1", NODE_PORT))
    program.listen()
    daemons.write(web(pods))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        with lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(HANG_GUARD)
            client.connect(("127.0.0.1", NODE_PORT))
            accepted, peer = program.accept()
            assert peer == client.getsockname()
        accepted.close()
        assert isinstance(send_request(lab.node, "::1", NODE_PORT), Answered)
        found = metrics(lab.node.namespace)
        assert found[metric("listener_creation_failures_total", 4)] >= 1
        assert found[metric("listeners", 4)] == 0
        assert found[metric("listeners", 6)] == 1
        line = f"NodePort: cannot listen on 127.0.0.1:{NODE_PORT}: Address already in use, retrying"
        assert daemons.log.read_text().count(line) == 1
        program.close()
        wait_until(lambda: metrics(lab.node.namespace)[metric("listeners", 4)] == 1, "kproxy listens")
        assert send_request(lab.node, "127.0.0.1", NODE_PORT) in {
            Answered(pod.name, lab.node.address()) for pod in pods
        }


def test_port_is_not_shared_with_another_program(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    """With SO_REUSEPORT, the kernel would distribute the connections between the program and kproxy."""
    with lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as program:
        program.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        program.bind(("127.0.0.1", NODE_PORT))
        program.listen()
        daemons.write(web(pods))
        with daemons.run(RANGES) as daemon:
            daemon.wait_until_synced()
            found = metrics(lab.node.namespace)
            assert found[metric("listeners", 4)] == 0
            assert found[metric("listener_creation_failures_total", 4)] >= 1


def test_port_is_shared_with_the_previous_process(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web(pods))
    with daemons.run(RANGES) as old:
        old.wait_until_synced()
        with daemons.run(
            RANGES, "--metrics-bind-address=127.0.0.1:11249", "--healthz-bind-address=127.0.0.1:11256"
        ) as new:
            new.wait_until_synced()
            assert "cannot listen on 127.0.0.1" not in daemons.log.read_text()
            assert old.terminate() == 0
            for address in LOOPBACK.values():
                assert isinstance(send_request(lab.node, address, NODE_PORT), Answered)


def test_endpoint_on_the_node_that_refuses_connections(lab: Lab, daemons: Daemons) -> None:
    """The kernel has only one port to choose, that of the endpoint: it would connect kproxy to itself."""
    found = web([lab.node])
    for each in found[2:]:
        each["ports"] = [{"name": "main", "protocol": "TCP", "port": 40_000}]
    daemons.write(found)
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        with lab.node.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.bind(("127.0.0.1", 50_000))
            client.settimeout(HANG_GUARD)
            lab.node.namespace.call(lambda: Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40000"))
            with pytest.raises(ConnectionResetError):  # the reset may arrive at once
                connect_and_receive(client)


def connect_and_receive(client: socket.socket) -> None:
    client.connect(("127.0.0.1", NODE_PORT))
    client.recv(1)


def test_changed_rules_are_restored(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    node = lab.node.namespace
    daemons.write(web(pods))
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        rules = NftablesRules(node)
        before = rules.text()
        for command in (
            f"delete element ip kube-proxy localhost-nodeports {{ udp . {NODE_PORT} }}",
            "flush map ip6 kube-proxy localhost-nodeports",
            "flush chain ip kube-proxy localhost-proxy",
            f"flush chain ip6 kube-proxy localhost-reject; delete counter ip6 kube-proxy {COUNTER}",
        ):
            node.run(["nft", command])
            wait_until(lambda: rules.text() == before, f"kproxy restores what {command} changed")
        assert send_request(lab.node, "::1", NODE_PORT, "UDP") == Refused()
        assert metrics(node)[metric("rejected_packets_total", 6, protocol="UDP")] == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_thread_exists_only_if_it_is_needed(lab: Lab, pods: list[Host], daemons: Daemons, setting: str) -> None:
    daemons.write(web(pods))
    with daemons.run(*SETTINGS[setting]) as daemon:
        daemon.wait_until_synced()
        os.kill(daemon.pid, signal.SIGUSR1)
        wait_until(lambda: "most recent call first" in daemons.log.read_text(), "kproxy writes its stacks")
        wait_until(lambda: "daemon.py" in daemons.log.read_text(), "kproxy writes all stacks")
        assert ("localhost_proxy.py" in daemons.log.read_text()) == (setting == "loopback")


def test_apply_rejects_because_nothing_serves(lab: Lab, pods: list[Host], daemons: Daemons) -> None:
    daemons.write(web(pods))
    proxy.apply(lab, daemons.objects, mode_flag("nftables"), RANGES)
    for address in LOOPBACK.values():
        assert send_request(lab.node, address, NODE_PORT) == Refused()
    with daemons.run(RANGES) as daemon:
        daemon.wait_until_synced()
        for address in LOOPBACK.values():
            assert isinstance(send_request(lab.node, address, NODE_PORT), Answered)
