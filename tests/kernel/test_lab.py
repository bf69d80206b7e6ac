"""The lab itself, checked with rules that kube-proxy programmed and against its documentation."""

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
    """Load the rules that kube-proxy programmed, without its nfacct counters, which do not exist in a new namespace."""
    for restore, recording in (("iptables", "iptables-save.txt"), ("ip6tables", "ip6tables-save.txt")):
        rules = (GOLDEN / scenario / recording).read_text()
        rules = re.sub(r"-m nfacct --nfacct-name +\S+ ", "", rules)
        lab.node.namespace.run([f"{restore}-restore"], rules)


def add_recorded_pods(lab: Lab, servers: Servers) -> tuple[Host, Host]:
    """Add the first recorded pods of node-1 and node-2."""
    local = lab.add_pod("here", "10.244.1.1", "fd00:10:244:1::1")
    remote = lab.add_pod("there", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    for pod in (local, remote):
        servers.serve(pod, 8080)
    return local, remote


@PROTOCOLS
@VERSIONS
def test_all_hosts_reach_all_pods_with_their_own_address(
    lab: Lab, servers: Servers, version: int, protocol: str
) -> None:
    local = lab.add_pod("here", "10.244.1.1", "fd00:10:244:1::1")
    remote = lab.add_pod("there", "10.244.2.1", "fd00:10:244:2::1", node="node-2")
    client = lab.add_client("client", "198.51.100.10", "2001:db8:51::10")
    for pod in (local, remote):
        servers.serve(pod, 8080, protocol)
    for origin in (local, remote, client, lab.node):
        for pod in (local, remote):
            answer = send_request(origin, pod.address(version), 8080, protocol)
            assert answer == Answered(pod.name, origin.address(version))


@PROTOCOLS
@VERSIONS
def test_closed_port_refuses(lab: Lab, version: int, protocol: str) -> None:
    pod = lab.add_pod("pod", "10.244.1.1", "fd00:10:244:1::1")
    assert send_request(lab.node, pod.address(version), 8080, protocol) == Refused()


def test_unassigned_address_is_unreachable(lab: Lab) -> None:
    client = lab.add_client("client", "198.51.100.10")
    assert send_request(client, "10.96.0.1", 80) == Failed("[Errno 101] Network is unreachable")


@PROTOCOLS
def test_dropped_packets_time_out(lab: Lab, protocol: str) -> None:
    lab.node.namespace.run(["iptables", "-A", "INPUT", "-p", protocol.lower(), "-j", "DROP"])
    client = lab.add_client("client", "198.51.100.10")
    assert send_request(client, lab.node.address(), 80, protocol, timeout=0.05) == TimedOut()


def test_client_can_have_many_addresses(lab: Lab, servers: Servers) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    client = lab.add_client("client", "198.51.100.10", "198.51.100.11")
    servers.serve(pod, 8080)
    assert send_request(client, pod.address(), 8080, source="198.51.100.11") == Answered("pod", "198.51.100.11")


def test_stream_never_reuses_a_source_port(lab: Lab) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    client = lab.add_client("client", "198.51.100.10")
    with pod.namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((pod.address(), 8080))
        listener.listen()
        with ConnectionStream([Target("web", client, pod.address(), 8080)]):
            ports = [_next_source_port(listener) for _ in range(50)]
    assert len(set(ports)) == 50
    assert set(ports) <= set(range(FIRST_SOURCE_PORT, FIRST_SOURCE_PORT + MAX_CONNECTIONS))


def _next_source_port(listener: socket.socket) -> int:
    """Accept and close a connection; return its source port."""
    connection, (_, port) = listener.accept()
    connection.close()
    return int(port)


def test_server_completes_accepted_requests_before_it_stops(lab: Lab, servers: Servers) -> None:
    pod = lab.add_pod("pod", "10.244.1.1")
    servers.serve(pod, 8080)
    with ThreadPoolExecutor(1) as background, open_connection(lab.node, pod.address(), 8080) as first:
        assert send_request(lab.node, pod.address(), 8080) == Answered(
            "pod", "10.99.0.2"
        )  # `first` has been accepted too
        stopping = background.submit(servers.stop, pod)
        wait_until(lambda: send_request(lab.node, pod.address(), 8080) == Refused(), "the pod to refuse connections")
        assert complete_request(first) == Answered("pod", "10.99.0.2")
        stopping.result()


def test_continuous_requests_record_all_outcomes(lab: Lab, servers: Servers) -> None:
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
    local, remote = add_recorded_pods(lab, servers)
    client = lab.add_pod("client", "10.244.1.9", "fd00:10:244:1::9")
    answers = [send_request(client, DUAL_STACK_VIPS[version], 80) for _ in range(100)]
    assert set(answers) == {Answered(pod.name, client.address(version)) for pod in (local, remote)}


@VERSIONS
def test_recorded_rules_masquerade_external_traffic(lab: Lab, servers: Servers, version: int) -> None:
    load_recorded_rules(lab, "dual-stack")
    add_recorded_pods(lab, servers)
    client = lab.add_client("client", "198.51.100.10", "2001:db8:51::10")
    seen = {send_request(client, DUAL_STACK_VIPS[version], 80) for _ in range(40)}
    assert seen == {Answered(pod, lab.node.address(version)) for pod in ("here", "there")}


@VERSIONS
def test_recorded_rules_support_hairpin_traffic(lab: Lab, servers: Servers, version: int) -> None:
    load_recorded_rules(lab, "dual-stack")
    local, remote = add_recorded_pods(lab, servers)
    seen = {send_request(local, DUAL_STACK_VIPS[version], 80) for _ in range(40)}
    assert seen == {
        Answered(local.name, lab.node.address(version)),
        Answered(remote.name, local.address(version)),
    }


def test_recorded_rules_reject_without_endpoints(lab: Lab) -> None:
    load_recorded_rules(lab, "no-endpoints")
    client = lab.add_pod("client", "10.244.1.9")
    assert send_request(client, EMPTY_VIP, 80) == Refused()


def test_recorded_rules_apply_session_affinity(lab: Lab, servers: Servers) -> None:
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


def test_lab_is_removed_when_its_process_is_killed(kernel: None) -> None:
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
        # setpriv executes the command after it has set the parent-death signal.
        wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n", "the command to run")
        owner.kill()
    assert select.select([child], [], [], HANG_GUARD)[0], "a process in the lab's namespace is still running"
    os.close(child)
