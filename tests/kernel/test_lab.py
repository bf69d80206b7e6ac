"""The lab itself, checked against rules that a real kube-proxy made, and against its own promises."""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lab.client import Answered, Failed, Refused, TimedOut, complete_request, open_connection, send_request
from tests.lab.connection_stream import FIRST_SOURCE_PORT, MAX_CONNECTIONS, ConnectionStream, Target
from tests.lab.continuous_requests import ContinuousRequests, count_by_pod, failures
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import HANG_GUARD, wait_until

GOLDEN = Path(__file__).parent.parent / "golden"
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
DUAL_STACK_VIPS = {4: "10.96.3.1", 6: "fd00:10:96::31"}
EMPTY_VIP = "10.96.1.4"
WEB_VIP = "10.96.1.1"
PROTOCOLS = pytest.mark.parametrize("protocol", ["TCP", "UDP"])


def load_recorded_rules(lab: Lab, scenario: str) -> None:
    """Load what kube-proxy left in the kernel; its nfacct counters do not exist in a new namespace."""
    for restore, recording in (("iptables", "iptables-save.txt"), ("ip6tables", "ip6tables-save.txt")):
        rules = (GOLDEN / scenario / recording).read_text()
        rules = re.sub(r"-m nfacct --nfacct-name +\S+ ", "", rules)
        lab.node.namespace.run([f"{restore}-restore"], rules)


def add_recorded_pods(lab: Lab, servers: Servers) -> tuple[Host, Host]:
    """Add the first pods of node-1 and node-2 in the recordings."""
    here = lab.add_pod("here", "10.244.1.1", "fd00:10:244:1::1")
    there = lab.add_pod("there", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    for pod in (here, there):
        servers.serve(pod, 8080)
    return here, there


@PROTOCOLS
@VERSIONS
def test_every_machine_reaches_every_pod_with_its_own_address(
    lab: Lab, servers: Servers, version: int, protocol: str
) -> None:
    here = lab.add_pod("here", "10.244.1.1", "fd00:10:244:1::1")
    there = lab.add_pod("there", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    client = lab.add_client("client", "198.51.100.10", "2001:db8:51::10")
    for pod in (here, there):
        servers.serve(pod, 8080, protocol)
    for origin in (here, there, client, lab.node):
        for pod in (here, there):
            answer = send_request(origin, pod.address(version), 8080, protocol)
            assert answer == Answered(pod.name, origin.address(version))


@PROTOCOLS
@VERSIONS
def test_a_closed_port_refuses(lab: Lab, version: int, protocol: str) -> None:
    pod = lab.add_pod("pod", "10.244.1.1", "fd00:10:244:1::1")
    assert send_request(lab.node, pod.address(version), 8080, protocol) == Refused()


def test_an_address_that_nobody_has_is_unreachable(lab: Lab) -> None:
    client = lab.add_client("client", "198.51.100.10")
    assert send_request(client, "10.96.0.1", 80) == Failed("[Errno 101] Network is unreachable")


@PROTOCOLS
def test_what_is_dropped_times_out(lab: Lab, protocol: str) -> None:
    lab.node.namespace.run(["iptables", "-A", "INPUT", "-p", protocol.lower(), "-j", "DROP"])
    client = lab.add_client("client", "198.51.100.10")
    assert send_request(client, lab.node.address(), 80, protocol, timeout=0.05) == TimedOut()


def test_a_client_may_have_many_addresses(lab: Lab, servers: Servers) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    client = lab.add_client("client", "198.51.100.10", "198.51.100.11")
    servers.serve(pod, 8080)
    assert send_request(client, pod.address(), 8080, source="198.51.100.11") == Answered("pod", "198.51.100.11")


def test_a_stream_never_comes_from_the_same_port_twice(lab: Lab) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    client = lab.add_client("client", "198.51.100.10")
    with pod.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((pod.address(), 8080))
        listener.listen()
        with ConnectionStream([Target("web", client, pod.address(), 8080)]):
            ports = [_port_of_next(listener) for _ in range(50)]
    assert len(set(ports)) == 50
    assert set(ports) <= set(range(FIRST_SOURCE_PORT, FIRST_SOURCE_PORT + MAX_CONNECTIONS))


def _port_of_next(listener: socket.socket) -> int:
    """Accept a connection, and close it; return where it came from."""
    connection, (_, port) = listener.accept()
    connection.close()
    return int(port)


def test_a_server_finishes_what_it_has_accepted(lab: Lab, servers: Servers) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    servers.serve(pod, 8080)
    with ThreadPoolExecutor(1) as background, open_connection(lab.node, pod.address(), 8080) as first:
        assert send_request(lab.node, pod.address(), 8080) == Answered("pod", "10.99.0.2")  # so `first` is accepted
        stopping = background.submit(servers.stop, pod)
        wait_until(lambda: send_request(lab.node, pod.address(), 8080) == Refused(), "the pod refuses")
        assert complete_request(first) == Answered("pod", "10.99.0.2")
        stopping.result()


def test_a_flow_counts_every_outcome(lab: Lab, servers: Servers) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    servers.serve(pod, 8080)
    with ContinuousRequests(lambda: send_request(lab.node, pod.address(), 8080)) as flow:
        assert flow.take(20) == {"pod": 20}
        servers.stop(pod)
        flow.settle()
        first = len(flow.outcomes)
        flow.take(10)
    assert failures(flow.outcomes)
    assert set(failures(flow.outcomes[first:])) == {Refused()}
    assert sum(count_by_pod(flow.outcomes).values()) + len(failures(flow.outcomes)) == len(flow.outcomes)


@VERSIONS
def test_recorded_rules_spread_connections(lab: Lab, servers: Servers, version: int) -> None:
    load_recorded_rules(lab, "dual-stack")
    here, there = add_recorded_pods(lab, servers)
    client = lab.add_pod("client", "10.244.1.9", "fd00:10:244:1::9")
    answers = [send_request(client, DUAL_STACK_VIPS[version], 80) for _ in range(100)]
    assert set(answers) == {Answered(pod.name, client.address(version)) for pod in (here, there)}


@VERSIONS
def test_recorded_rules_masquerade_what_comes_from_outside(lab: Lab, servers: Servers, version: int) -> None:
    load_recorded_rules(lab, "dual-stack")
    add_recorded_pods(lab, servers)
    client = lab.add_client("client", "198.51.100.10", "2001:db8:51::10")
    seen = {send_request(client, DUAL_STACK_VIPS[version], 80) for _ in range(40)}
    assert seen == {Answered(pod, lab.node.address(version)) for pod in ("here", "there")}


@VERSIONS
def test_recorded_rules_let_a_pod_reach_itself(lab: Lab, servers: Servers, version: int) -> None:
    load_recorded_rules(lab, "dual-stack")
    here, there = add_recorded_pods(lab, servers)
    seen = {send_request(here, DUAL_STACK_VIPS[version], 80) for _ in range(40)}
    assert seen == {
        Answered(here.name, lab.node.address(version)),
        Answered(there.name, here.address(version)),
    }


def test_recorded_rules_refuse_without_endpoints(lab: Lab) -> None:
    load_recorded_rules(lab, "no-endpoints")
    client = lab.add_pod("client", "10.244.1.9")
    assert send_request(client, EMPTY_VIP, 80) == Refused()


def test_recorded_rules_keep_clients_with_their_pod(lab: Lab, servers: Servers) -> None:
    load_recorded_rules(lab, "session-affinity")
    pods = [
        lab.add_pod("a", "10.244.1.1"),
        lab.add_pod("b", "10.244.2.1", node="node-2"),
        lab.add_pod("c", "10.244.2.2", node="node-2"),
    ]
    for pod in pods:
        servers.serve(pod, 8080)
    client = lab.add_pod("client", "10.244.1.9")
    assert len({send_request(client, WEB_VIP, 80) for _ in range(30)}) == 1


def test_nothing_of_a_lab_outlives_a_killed_process(kernel: None) -> None:
    script = (
        "import sys; from tests.lab.topology import Lab; lab = Lab();"
        "child = lab.node.namespace.popen(['sleep', 'infinity'], sys.stderr);"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        child = os.pidfd_open(pid)
        # setpriv becomes the command once it has asked the kernel for the signal.
        wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the command runs")
        owner.kill()
    assert select.select([child], [], [], HANG_GUARD)[0], "a process in the lab's namespace is still there"
    os.close(child)
