"""`kproxy explain` finds what is wrong with the rules and tracked connections of a Service in the kernel."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kproxy.diagnose.kernel_facts import with_kernel
from tests.kernel.test_conntrack import Flow, insert
from tests.lab.links import add_addresses
from tests.lab.modes import BOTH_MODES
from tests.lab.namespace import Namespace
from tests.unit.explain_cases import DUAL_STACK, NODE_PORT, OTHER, PODS, SLICE, SLICE_IPV6, cluster, edit
from tests.unit.test_explain_daemon import facts, state

KPROXY = (sys.executable, "-m", "kproxy")
UDP = (
    NODE_PORT.replace("protocol: TCP", "protocol: UDP"),
    SLICE.replace("protocol: TCP", "protocol: UDP"),
    PODS.replace("containerPort: 8080", "containerPort: 8080, protocol: UDP"),
)
AFFINITY = edit(NODE_PORT, "  selector:", "  sessionAffinity: ClientIP\n  selector:")
DROPPING = edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:")


class Machine:
    """A node in a namespace, with the rules of one mode."""

    def __init__(self, namespace: Namespace, objects: Path, mode: str) -> None:
        self.namespace = namespace
        self.objects = objects
        self.flags: tuple[str, ...] = (f"--objects={objects}", "--hostname-override=node-1", f"--proxy-mode={mode}")

    def apply(self, yaml: str) -> None:
        self.objects.write_text(yaml)
        self.namespace.run([*KPROXY, "apply", *self.flags, "--conntrack-max-per-core=0", "--conntrack-min=0"])

    def explain(self, yaml: str = "") -> dict[str, Any]:
        if yaml:
            self.objects.write_text(yaml)
        done = self.namespace.run([*KPROXY, "explain", "shop/api", *self.flags, "--kernel", "-o", "json"], check=False)
        assert done.returncode in {0, 1}, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (report["verdict"] != "WORKS")
        return report

    def conclusion(self, yaml: str = "") -> tuple[str, str | None]:
        report = self.explain(yaml)
        return report["verdict"], report["reason"] and report["reason"]["code"]

    def chains(self, prefix: str) -> list[str]:
        """Return the names of iptables chains of table nat."""
        listed = self.namespace.run(["iptables", "-t", "nat", "-S"]).stdout
        return re.findall(rf"^-N ({prefix}\S*)", listed, re.MULTILINE)


@pytest.fixture
def machine(namespace: Namespace, nft: None, tmp_path: Path, mode: str) -> Machine:
    namespace.run(["ip", "link", "set", "lo", "up"])
    add_addresses(namespace, "lo", "192.168.0.11/24", "fd00::11/64")
    return Machine(namespace, tmp_path / "all.yaml", mode)


@BOTH_MODES
@pytest.mark.parametrize(
    "service", [NODE_PORT, AFFINITY, DROPPING, DUAL_STACK], ids=["NodePort", "affinity", "policy Local", "dual-stack"]
)
def test_programmed_rules_match(machine: Machine, service: str) -> None:
    text = cluster(service, SLICE, SLICE_IPV6, PODS, OTHER)
    assert machine.conclusion(text) == ("NOT PROGRAMMED", "NotSyncedYet")
    machine.apply(text)
    report = machine.explain()
    assert (report["verdict"], report["kernel"]["matches"], report["kernel"]["differences"]) == ("WORKS", True, [])


@BOTH_MODES
def test_rules_that_reject_match(machine: Machine) -> None:
    text = cluster(NODE_PORT, PODS, OTHER)
    machine.apply(text)
    report = machine.explain()
    assert (report["verdict"], report["reason"]["code"], report["kernel"]["matches"]) == (
        "REJECTED",
        "NoEndpoints",
        True,
    )


NFT_DAMAGES = {
    "element": ("flush map ip kube-proxy service-ips", "10.96.0.82:80/TCP"),
    "endpoint": ("flush map ip kube-proxy service-endpoints", "of service-endpoints"),
    "ClusterIP": ("delete element ip kube-proxy cluster-ips { 10.96.0.82 }", "10.96.0.82"),
    "base chain": ("flush chain ip kube-proxy nat-prerouting", "nat-prerouting"),
    "shared chain": ("flush chain ip kube-proxy service-any-2", "service-any-2"),
    "extra verdict": (
        "add element ip kube-proxy no-endpoint-services { 10.96.0.82 . tcp . 80 : drop }",
        "no-endpoint-services must not exist",
    ),
    "dormant": ("add table ip kube-proxy { flags dormant; }", "dormant"),
}


@pytest.mark.parametrize("mode", ["nftables"])
@pytest.mark.parametrize("damage", NFT_DAMAGES)
def test_drift_in_nftables_mode(machine: Machine, damage: str) -> None:
    command, named = NFT_DAMAGES[damage]
    machine.apply(cluster(NODE_PORT, SLICE, PODS))
    machine.namespace.run(["nft", *command.split()])
    report = machine.explain()
    assert (report["verdict"], report["reason"]["code"]) == ("DEGRADED", "Drifted")
    assert named in " ".join((report["reason"]["message"], *report["reason"]["details"]))
    assert report["kernel"]["differences"]


IPTABLES_DAMAGES: dict[str, tuple[Callable[[Machine], list[str]], str]] = {
    "dispatch": (lambda _: ["-t", "nat", "-D", "KUBE-SERVICES", "1"], "10.96.0.82:80/TCP"),
    "NodePort": (lambda _: ["-t", "nat", "-F", "KUBE-NODEPORTS"], "NodePort 30080/TCP"),
    "endpoint": (lambda machine: ["-t", "nat", "-F", machine.chains("KUBE-SEP-")[0]], "KUBE-SEP-"),
    "balancing": (lambda machine: ["-t", "nat", "-F", machine.chains("KUBE-SVC-")[0]], "KUBE-SVC-"),
    "jump": (lambda _: ["-t", "nat", "-F", "PREROUTING"], "does not jump to KUBE-SERVICES"),
}


@pytest.mark.parametrize("mode", ["iptables"])
@pytest.mark.parametrize("damage", IPTABLES_DAMAGES)
def test_drift_in_iptables_mode(machine: Machine, damage: str) -> None:
    command, named = IPTABLES_DAMAGES[damage]
    machine.apply(cluster(NODE_PORT, SLICE, PODS))
    machine.namespace.run(["iptables", *command(machine)])
    report = machine.explain()
    assert (report["verdict"], report["reason"]["code"]) == ("DEGRADED", "Drifted")
    assert named in " ".join((report["reason"]["message"], *report["reason"]["details"]))


@pytest.mark.parametrize("mode", ["iptables"])
def test_split_dispatch_chains(machine: Machine) -> None:
    others = [OTHER.replace("aaa", f"x{number}").replace("10.96.0.90", f"10.96.1.{number}") for number in range(1, 60)]
    text = cluster(NODE_PORT, SLICE, PODS, *others)
    config = machine.objects.with_name("config.yaml")
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "kproxy: {iptablesDispatchThreshold: 10}\n"
    )
    machine.flags = (*machine.flags, f"--config={config}")
    machine.apply(text)
    assert machine.chains("KUBE-SVC-10.")
    assert machine.conclusion() == ("WORKS", None)
    for shard in machine.chains("KUBE-SVC-10.96.0"):
        machine.namespace.run(["iptables", "-t", "nat", "-F", shard])
    assert machine.conclusion() == ("DEGRADED", "Drifted")


@BOTH_MODES
def test_many_endpoints_and_ports(machine: Machine) -> None:
    endpoints = "".join(f"- {{addresses: [10.244.3.{number}], nodeName: node-2}}\n" for number in range(1, 121))
    ports = "".join(f"  - {{name: p{number}, port: {number}, targetPort: http}}\n" for number in range(1001, 1005))
    names = "".join(f"{{name: p{number}, port: {number}}}, " for number in range(1001, 1005))
    slices = edit(edit(SLICE, "endpoints:\n", f"endpoints:\n{endpoints}"), "ports: [", f"ports: [{names}")
    text = cluster(NODE_PORT + ports, slices)
    machine.apply(text)
    insert(machine.namespace, Flow("10.244.1.77:4000", "10.96.0.82:1003", "10.244.3.9:1003", socket.IPPROTO_TCP))
    report = machine.explain()
    assert (report["verdict"], report["kernel"]["matches"]) == ("WORKS", True)
    assert [(flow["frontend"], flow["stale"]) for flow in report["flows"]] == [("10.96.0.82:1003", False)]


@BOTH_MODES
def test_what_another_service_owns_is_no_drift(machine: Machine) -> None:
    contested = edit(NODE_PORT, "  selector:", "  externalIPs: [198.51.100.5]\n  selector:")
    text = cluster(contested, SLICE, PODS, edit(OTHER, "  ports:", "  externalIPs: [198.51.100.5]\n  ports:"))
    machine.apply(text)
    report = machine.explain()
    assert (report["verdict"], report["reason"]["code"]) == ("DEGRADED", "AddressConflict")
    assert report["kernel"]["matches"]


@BOTH_MODES
def test_owners_that_only_the_kernel_knows(machine: Machine, mode: str) -> None:
    """Without the other Services, such as with only a daemon, the kernel tells which of them owns a frontend."""
    contested = edit(NODE_PORT, "  selector:", "  externalIPs: [198.51.100.5]\n  selector:")
    machine.apply(cluster(contested, SLICE, PODS, edit(OTHER, "  ports:", "  externalIPs: [198.51.100.5]\n  ports:")))
    daemon = state(cluster(contested, SLICE, PODS), mode=mode)
    found = machine.namespace.call(lambda: with_kernel(facts(daemon), whole=False))
    assert found.kernel is not None
    assert found.kernel.owners == {"198.51.100.5:80/TCP": "shop/aaa"}
    assert found.kernel.differences == ()


@BOTH_MODES
@pytest.mark.parametrize("frontend", ["10.96.0.82:80", "192.168.0.11:30080"], ids=["ClusterIP", "NodePort"])
def test_stale_udp_flows(machine: Machine, frontend: str) -> None:
    machine.apply(cluster(*UDP))
    insert(machine.namespace, Flow("10.244.1.77:4000", frontend, "10.244.1.5:8080"))
    report = machine.explain()
    assert (report["verdict"], [flow["stale"] for flow in report["flows"]]) == ("WORKS", [False])
    insert(
        machine.namespace,
        Flow("10.244.1.77:4001", frontend, "10.244.1.99:8080"),
        Flow("10.244.1.77:4002", frontend, "10.244.1.99:8080"),
        Flow("10.244.1.77:4003", "10.96.0.83:80", "10.244.1.99:8080"),  # of another Service
        Flow("10.244.1.77:4004", "198.51.100.1:30080", "198.51.100.1:30080"),  # not to this node
    )
    report = machine.explain()
    assert (report["verdict"], report["reason"]["code"]) == ("DEGRADED", "StaleConntrack")
    assert [(flow["endpoint"], flow["count"], flow["stale"]) for flow in report["flows"]] == [
        ("10.244.1.99:8080", 2, True),
        ("10.244.1.5:8080", 1, False),
    ]
    machine.namespace.run(report["reason"]["fix"].partition(": ")[2].split())
    assert machine.conclusion() == ("WORKS", None)
    assert [flow["stale"] for flow in machine.explain()["flows"]] == [False]


@BOTH_MODES
def test_old_tcp_connections_are_no_problem(machine: Machine) -> None:
    machine.apply(cluster(NODE_PORT, SLICE, PODS))
    insert(machine.namespace, Flow("10.244.1.77:4000", "10.96.0.82:80", "10.244.1.99:8080", socket.IPPROTO_TCP))
    report = machine.explain()
    assert (report["verdict"], [flow["stale"] for flow in report["flows"]]) == ("WORKS", [True])
