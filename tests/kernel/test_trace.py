"""`kproxy trace` on a node agrees with the packets that it really sends, also through tables of other programs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kproxy.diagnose.trace.ask import KernelTrace, TracedPacket, trace_kernel
from kproxy.diagnose.trace.trace import PacketTrace
from tests.lab.client import Answered, Outcome, Refused, TimedOut, open_connection, send_request
from tests.lab.modes import BOTH_MODES, mode_flag
from tests.lab.namespace import Namespace
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import wait_until
from tests.lab.web_service import CLUSTER_IPS, EXTERNAL_IPS, NODE_PORT, WebService

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
TRIES = 20
"""Enough connections to reach both of two endpoints: the chance of missing one is below 1 in 500,000."""
SILENCE = 0.25

REJECTIONS = ("prohibited", "unreachable", "No route", "Permission denied")
"""Errors of connections that are rejected with ICMP messages other than "port unreachable"."""

NFT_FIREWALL = """
table inet site {
	map verdicts {
		type inet_proto . inet_service : verdict
		flags interval
		elements = { tcp . 8080-8090 : jump web }
	}
	chain web {
		ip daddr 10.244.1.2 drop comment "not to this pod"
		ip6 daddr fd00:10:244:1::2 drop
		meta mark & 0x00000f00 == 0x00000100 drop
		ip saddr 198.51.100.0/24 reject with icmp admin-prohibited
		ip6 saddr 2001:db8:51::/64 reject with icmpv6 admin-prohibited
	}
	chain forward {
		type filter hook forward priority filter + 10; policy accept;
		ct state vmap { established : accept, related : accept }
		meta l4proto . th dport vmap @verdicts
	}
	chain output {
		type filter hook output priority filter + 10; policy accept;
		ct status dnat meta mark set meta mark | 0x00000100
	}
}
"""
IPTABLES_FIREWALL = """
*filter
:FORWARD DROP [0:0]
:SITE - [0:0]
:SITE-ACCEPT - [0:0]
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -j SITE
-A SITE -p tcp -m multiport --dports 8080,8443 -m conntrack --ctstate DNAT -g SITE-ACCEPT
-A SITE -j REJECT
-A SITE-ACCEPT -m iprange {dst} -j DROP
-A SITE-ACCEPT -i eth0 -j RETURN
-A SITE-ACCEPT -j ACCEPT
COMMIT
"""


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path) -> WebService:
    folder = tmp_path / "objects"
    folder.mkdir()
    return WebService(lab, servers, folder, "TCP")


def trace(node: Namespace, *flags: str) -> dict[str, Any]:
    done = node.run([sys.executable, "-m", "kproxy", "trace", "-o", "json", *flags], check=False)
    assert done.returncode in {0, 1, 3}, done.stderr
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {0: "works", 1: "broken", 3: "unknown"}[done.returncode] == found["answer"]
    return found


def to(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def ask(node: Namespace, source: str, address: str, port: int) -> PacketTrace:
    """Trace a TCP packet inside a node without the time that it takes to start a program."""
    packet = TracedPacket(source=source, destination=address, port=port, protocol="TCP")
    return node.call(lambda: trace_kernel(packet, None))


def predicted(found: PacketTrace, pods: dict[str, Host]) -> set[str]:
    """Return what the trace says about the outcomes of connections."""
    assert (found.unknowns, found.unknown_probability) == ((), 0)
    outcomes = set()
    for outcome in found.outcomes:
        if outcome.verdict == "accepted":
            outcomes.add(f"{pods[outcome.destination].name}{' masqueraded' if outcome.masqueraded else ''}")
        else:
            outcomes.add(outcome.verdict)
    return outcomes


def observed(origin: Host, address: str, port: int) -> set[str]:
    """Return the outcomes of real connections."""
    results: set[Outcome] = set()
    for _ in range(TRIES):
        results.add(send_request(origin, address, port, timeout=SILENCE))
    return {_name(each, origin) for each in results}


def _name(outcome: Outcome, origin: Host) -> str:
    if isinstance(outcome, Answered):
        return f"{outcome.pod}{'' if outcome.source in origin.addresses else ' masqueraded'}"
    if isinstance(outcome, TimedOut):
        return "dropped"
    if isinstance(outcome, Refused) or any(text in outcome.reason for text in REJECTIONS):
        return "rejected"
    return outcome.reason


@BOTH_MODES
@VERSIONS
@pytest.mark.parametrize("firewall", ["none", "nft", "iptables"])
def test_prediction_is_what_happens(web: WebService, version: int, mode: str, firewall: str) -> None:
    pods = [web.pod(1), web.pod(2)]
    node = web.node.namespace
    node.sysctl(ipv4__icmp_ratelimit=0, ipv6__icmp__ratelimit=0)
    node.run(["nft", "-f", "-"], NFT_FIREWALL if firewall == "nft" else "")
    if firewall == "iptables":
        ranges = {4: "--dst-range 10.244.1.2-10.244.1.9", 6: "--dst-range fd00:10:244:1::2-fd00:10:244:1::9"}
        program = "ip6tables-restore" if version == 6 else "iptables-restore"
        node.run([program], IPTABLES_FIREWALL.format(dst=ranges[version]))
    service = web.service("web", *CLUSTER_IPS.values(), type="NodePort", externalIPs=[*EXTERNAL_IPS.values()])
    web.apply([service, *web.slices("web", pods)], mode_flag(mode))
    by_socket = {to(pod.address(version), 8080): pod for pod in pods}
    own = web.node.address(version)
    frontends = [(CLUSTER_IPS[version], 80), (CLUSTER_IPS[version], 81), (EXTERNAL_IPS[version], 80), (own, NODE_PORT)]
    for origin in (web.client, web.outsider, web.node):
        for address, port in frontends:
            if port == 81 and mode == "iptables":
                continue  # leaves for a router that answers by itself
            source = own if origin is web.node else origin.address(version)
            found = ask(node, source, address, port)
            expected, actual = predicted(found, by_socket), observed(origin, address, port)
            if origin is web.node:  # masqueraded or not, pods see the same address
                expected = {name.removesuffix(" masqueraded") for name in expected}
            assert actual == expected, (origin.name, address, port, found.summary)


def test_both_variants_of_iptables_are_read(namespace: Namespace, variant: str) -> None:
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run([f"iptables-{variant}", "-A", "OUTPUT", "-d", "10.1.2.3", "-p", "tcp", "--dport", "80", "-j", "DROP"])
    found = ask(namespace, "127.0.0.1", "10.1.2.3", 80)
    (path,) = found.paths
    assert path.outcome.verdict == "dropped"
    assert path.steps[-1].rule is not None
    assert path.steps[-1].rule.family == ("iptables-legacy" if variant == "legacy" else "iptables")
    assert ask(namespace, "127.0.0.1", "10.1.2.3", 81).outcomes[0].verdict == "accepted"


def test_connection_that_exists_is_decided_by_conntrack(web: WebService) -> None:
    pods = [web.pod(1), web.pod(2)]
    node = web.node.namespace
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", pods)])
    client = web.client.address()
    with open_connection(web.client, CLUSTER_IPS[4], 80, source_port=45678) as connection:
        assert isinstance(connection, socket.socket)
        deadline = time.monotonic() + 10
        found = trace(node, f"--from={client}:45678", f"--to={CLUSTER_IPS[4]}:80")
        while not found["connections"] and time.monotonic() < deadline:
            found = trace(node, f"--from={client}:45678", f"--to={CLUSTER_IPS[4]}:80")
        (entry,) = found["connections"]
        (outcome,) = found["outcomes"]
        assert outcome["destination"] == entry["endpoint"]
        new = trace(node, f"--from={client}", f"--to={CLUSTER_IPS[4]}:80")
        assert len(new["outcomes"]) == 2
        assert new["connections"] == [entry]


@BOTH_MODES
@pytest.mark.parametrize("firewall", ["", NFT_FIREWALL], ids=["none", "nft"])
def test_real_packet_takes_the_predicted_way(web: WebService, mode: str, firewall: str) -> None:
    pods = [web.pod(1), web.pod(2)]
    node = web.node.namespace
    node.run(["nft", "-f", "-"], firewall)
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", pods)], mode_flag(mode))
    found = trace(node, f"--from={web.node.address()}", f"--to={CLUSTER_IPS[4]}:80", "--live")
    assert found["live"]["agrees"], found["live"]
    assert found["live"]["verdict"] == "accepted"
    assert found["live"]["endpoint"] in {to(pod.address(), 8080) for pod in pods}
    assert len(found["live"]["rules"]) > 3
    with ThreadPoolExecutor(1) as pool:
        tracing = pool.submit(trace, node, f"--from={web.outsider.address()}", f"--to={CLUSTER_IPS[4]}:80", "--live")
        while not tracing.done():
            send_request(web.outsider, CLUSTER_IPS[4], 80, timeout=SILENCE)
        found = tracing.result()
    assert found["live"]["agrees"], found["live"]
    assert found["live"]["verdict"] == ("dropped" if firewall else "accepted")
    assert "kproxy-trace" not in node.run(["nft", "list", "tables"]).stdout


def test_packet_that_does_not_go_as_predicted_makes_the_answer_unknown(web: WebService) -> None:
    pods = [web.pod(1)]
    node = web.node.namespace
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", pods)])
    packet = TracedPacket(source=web.node.address(), destination=CLUSTER_IPS[4], port=80, protocol="TCP")
    kernel = node.call(lambda: KernelTrace(packet, None))
    node.run(["nft", "-f", "-"], NFT_FIREWALL.replace("ct status dnat meta", "ct status dnat drop\n\t\tmeta"))
    found = node.call(kernel.watch)
    assert found.live is not None
    assert (found.live.agrees, found.live.verdict, found.answer) == (False, "dropped", "unknown")


def test_table_of_a_live_trace_disappears_when_it_is_killed(web: WebService, tmp_path: Path) -> None:
    node = web.node.namespace
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [web.pod(1)])])

    def exists() -> bool:
        return "kproxy-trace" in node.run(["nft", "list", "tables"]).stdout

    with (tmp_path / "output").open("w") as output:
        command = ["trace", f"--from={web.outsider.address()}", f"--to={CLUSTER_IPS[4]}:80", "--live"]
        process = node.popen([sys.executable, "-m", "kproxy", *command], output)
        wait_until(exists, "the table of the trace")
        process.kill()
        process.wait()
    wait_until(lambda: not exists(), "the end of the table")
    assert (tmp_path / "output").read_text() == (
        f"waiting for a packet from {web.outsider.address()} to {CLUSTER_IPS[4]}:80: send one now\n"
    )


def test_live_trace_refuses_iptables_legacy(namespace: Namespace, variant: str) -> None:
    if variant != "legacy":
        pytest.skip("about iptables-legacy")
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run(["iptables-legacy", "-A", "OUTPUT", "-d", "10.1.2.3", "-j", "DROP"])
    command = [sys.executable, "-m", "kproxy", "trace", "--from=127.0.0.1", "--to=10.1.2.3:80", "--live"]
    done = namespace.run(command, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "iptables-legacy" in done.stderr


def test_without_root_the_answer_is_unknown() -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    command = [sys.executable, "-m", "kproxy", "trace", "--from=10.244.1.5", "--to=10.96.0.80:80"]
    done = subprocess.run([*nobody, *command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert "root" in line
    assert "--dump=FILE" in line
