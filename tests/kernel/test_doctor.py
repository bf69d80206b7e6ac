"""`kproxy doctor` in network namespaces with real rules, sysctls, interfaces and sockets."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from msgspec.structs import replace

from kproxy.cli.output import WIDTH
from kproxy.config import Config
from kproxy.config.conntrack_sysctls import MAX
from kproxy.diagnose.doctor import DoctorReport, findings
from kproxy.diagnose.host_facts import gather
from kproxy.diagnose.report import schema
from kproxy.host.chain_survey import survey_chains
from kproxy.host.links import default_route_interfaces, links
from kproxy.host.nf_tables import current_generation
from kproxy.host.observed import BaseChain
from kproxy.host.processes import listening_sockets
from kproxy.model.types import Family
from kproxy.nftables.probe import unsupported_reason
from tests.apiserver import ApiServer
from tests.lab import objects
from tests.lab.iptables import missing_variant, restore_recording
from tests.lab.namespace import Namespace
from tests.lab.proxy import Daemon
from tests.lab.requirements import UNPRIVILEGED
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until
from tests.recordings import GOLDEN

COMMAND = [sys.executable, "-m", "kproxy", "doctor"]
READ_ANY_FILE = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""Lets an unprivileged process read the Python of these tests, wherever it is installed. Grants nothing else."""


def doctor(node: Namespace, *flags: str, prefix: Sequence[str] = ()) -> dict[str, Any]:
    """Return the report of the command as JSON. Its exit code is in the field `code`."""
    done = node.run([*prefix, *COMMAND, "-o", "json", *flags], check=False)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    Draft202012Validator(schema(DoctorReport)).validate(report)
    return {**report, "code": done.returncode}


def severities(report: dict[str, Any]) -> dict[str, str]:
    """Return the severity of each reason code."""
    return {each["code"]: each["severity"] for each in report["findings"]}


def message(report: dict[str, Any], code: str) -> str:
    """Return the message of the only finding with this code."""
    (found,) = [each["message"] for each in report["findings"] if each["code"] == code]
    return str(found)


@pytest.fixture
def sound(node: Namespace) -> Namespace:
    """A node on which everything is as it should be."""
    node.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
    return node


@pytest.fixture(params=["nftables", "iptables"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_sound_node(sound: Namespace, mode: str) -> None:
    report = doctor(sound, f"--proxy-mode={mode}")
    assert report["code"] == 0, report
    assert (report["mode"], report["complete"], report["errors"], report["warnings"]) == (mode, True, 0, 0)
    passed = {code for code, severity in severities(report).items() if severity == "ok"}
    assert passed >= {
        "Privileged",
        "ModeSupported",
        "IPForwardingEnabled",
        "NoFirewallDrops",
        "OneVariant",
        "PortsFree",
    }


def test_doctor_changes_nothing(sound: Namespace, mode: str) -> None:
    before = sound.call(current_generation)
    doctor(sound, f"--proxy-mode={mode}")
    assert sound.call(current_generation) == before
    assert sound.run(["nft", "list", "ruleset"]).stdout == ""
    for program in ("ip_tables_names", "ip6_tables_names"):
        path = Path("/proc/thread-self/net") / program
        assert sound.call(lambda path=path: path.read_text() if path.exists() else "") == ""  # type: ignore[misc]


@pytest.mark.parametrize("family", Family)
def test_probe_of_nftables_mode_is_accepted_and_leaves_no_trace(node: Namespace, family: Family) -> None:
    before = node.call(current_generation)
    assert node.call(lambda: unsupported_reason(family)) == ""
    assert node.call(current_generation) == before


def test_disabled_forwarding(node: Namespace) -> None:
    node.sysctl(ipv4__ip_forward=0, ipv6__conf__all__forwarding=0)
    report = doctor(node, "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48")
    assert report["code"] == 1
    assert severities(report).items() >= {("IPForwardingDisabled", "error"), ("IPv6ForwardingDisabled", "error")}


def test_rules_for_services_in_both_variants(sound: Namespace) -> None:
    for variant in ("nft", "legacy"):
        if reason := missing_variant(variant, sound):
            pytest.skip(reason)
        sound.run([f"iptables-{variant}", "-t", "nat", "-N", "KUBE-SERVICES"])
    report = doctor(sound, "--proxy-mode=nftables")
    assert report["code"] == 1
    assert "iptables-nft (1 chain) and iptables-legacy (1)" in message(report, "ServiceRulesInBothVariants")


def test_unrelated_rules_in_both_variants(sound: Namespace) -> None:
    for variant in ("nft", "legacy"):
        if reason := missing_variant(variant, sound):
            pytest.skip(reason)
        sound.run([f"iptables-{variant}", "-N", "mine"])
    assert severities(doctor(sound)).items() >= {("RulesInBothVariants", "warning")}


@pytest.mark.parametrize("program", ["iptables-legacy", "ip6tables-legacy"])
def test_stale_rules_of_iptables_legacy(sound: Namespace, mode: str, program: str) -> None:
    if reason := missing_variant("legacy", sound):
        pytest.skip(reason)
    sound.run([program, "-t", "nat", "-N", "KUBE-SERVICES"])
    assert "ServiceRulesInOtherVariant" in severities(doctor(sound, f"--proxy-mode={mode}"))


def test_leftovers_of_kube_proxy(sound: Namespace) -> None:
    restore_recording(sound, "clusterip")
    assert severities(doctor(sound, "--proxy-mode=iptables")).items() >= {("KubeProxyLeftovers", "info")}
    report = doctor(sound, "--proxy-mode=nftables")
    assert severities(report).items() >= {("OtherModeLeftovers", "info")}
    assert " of iptables mode; kproxy removes them" in message(report, "OtherModeLeftovers")


def test_tables_of_kube_proxy_and_kproxy(sound: Namespace, nft: None) -> None:
    sound.run(["nft", "-f", "-"], (GOLDEN / "clusterip/nft-ip.txt").read_text())
    assert severities(doctor(sound, "--proxy-mode=nftables")).items() >= {("KubeProxyLeftovers", "info")}
    assert severities(doctor(sound, "--proxy-mode=iptables")).items() >= {("OtherModeLeftovers", "info")}
    sound.run(["nft", "add map ip kube-proxy service-endpoints { type ipv4_addr : verdict; }"])  # kproxy's map
    assert "KubeProxyLeftovers" not in severities(doctor(sound, "--proxy-mode=nftables"))


def test_interface_of_ipvs_mode(sound: Namespace) -> None:
    sound.run(["ip", "link", "add", "kube-ipvs0", "type", "bridge"])  # some kernels have no type dummy
    assert "the interface kube-ipvs0" in message(doctor(sound), "IPVSLeftovers")


FIREWALLS = {
    "firewalld": (
        """
        table inet firewalld {
            chain zones {
            }
            chain filter_FORWARD {
                type filter hook forward priority filter + 10; policy accept;
                ct state established,related accept
                jump zones
                counter reject with icmpx admin-prohibited
            }
        }
        """,
        ("FirewallAtForward", "warning", "chain filter_FORWARD of table inet firewalld (firewalld) rejects what"),
    ),
    "policy": (
        "table inet mine {\n chain f {\n type filter hook forward priority 0; policy drop;\n }\n}\n",
        ("FirewallDropsEverything", "error", "chain f of table inet mine drops all packets at hook forward"),
    ),
    "verdict map": (
        "table inet mine {\n chain f {\n type filter hook output priority -5; policy drop;\n"
        " ct state vmap { established : accept, invalid : drop }\n }\n}\n",
        ("FirewallAtOutput", "warning", "chain f of table inet mine drops what its rules do not accept"),
    ),
    "unconditional": (
        "table ip mine {\n chain i {\n type filter hook input priority 0;\n iif lo accept\n counter drop\n accept\n"
        " }\n}\n",
        ("FirewallAtInput", "info", "chain i of table ip mine drops what"),
    ),
    "Calico": (
        "table ip filter {\n chain cali-FORWARD {\n }\n chain FORWARD {\n type filter hook forward priority 0;"
        " policy drop;\n counter jump cali-FORWARD\n }\n}\n",
        ("FirewallWithPlugin", "info", "(Calico)"),
    ),
}


@pytest.mark.parametrize("name", FIREWALLS)
def test_firewalls_of_nftables(sound: Namespace, nft: None, name: str) -> None:
    ruleset, (code, severity, text) = FIREWALLS[name]
    sound.run(["nft", "-f", "-"], ruleset)
    report = doctor(sound)
    assert severities(report)[code] == severity, report
    assert text in message(report, code)


@pytest.mark.parametrize("rule", ["DROP", "REJECT", "-m comment --comment all DROP"])
def test_firewall_of_iptables(sound: Namespace, variant: str, rule: str) -> None:
    words = rule.split()
    program = f"iptables-{variant}"
    sound.run([program, "-N", "ufw-before-forward"])
    sound.run([program, "-A", "FORWARD", "-j", "ufw-before-forward"])
    sound.run([program, "-A", "FORWARD", *words[:-1], "-j", words[-1]])
    sound.run([program, "-P", "INPUT", "DROP"])
    report = doctor(sound, "--proxy-mode=nftables")
    assert "(ufw)" in message(report, "FirewallAtForward")
    assert "chain INPUT" in message(report, "FirewallDropsEverything")


def test_harmless_chains_are_not_reported(sound: Namespace, nft: None) -> None:
    sound.run(
        ["nft", "-f", "-"],
        "table inet mine {\n chain f {\n type filter hook forward priority 0;\n tcp dport 25 drop\n }\n"
        " chain n {\n type nat hook prerouting priority -100;\n }\n}\n",
    )
    assert "NoFirewallDrops" in severities(doctor(sound))
    survey = sound.call(survey_chains)
    assert survey.names == (("inet", "mine", "f"), ("inet", "mine", "n"))
    assert survey.base == (BaseChain("inet", "mine", "f", "forward", 0),)


def test_connection_tracking_that_is_nearly_full(sound: Namespace) -> None:
    sound.run(
        ["nft", "-f", "-"], "table ip t {\n chain o {\n type filter hook output priority 0;\n ct state new\n }\n}\n"
    )
    with sound.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for port in range(20000, 20090):
            client.sendto(b"", ("10.99.0.2", port))
    facts = sound.call(lambda: gather(Config()))
    assert "ConntrackTable" in {each.code for each in findings(facts)}
    # The limit is a setting of the whole machine. Only its value is replaced; the entries are real.
    full = replace(facts, parameters={**facts.parameters, MAX: 100})
    (finding,) = [each for each in findings(full) if each.code == "ConntrackTableFull"]
    assert finding.message.startswith("90 of 100 connection tracking entries")


def test_ports_that_are_taken(sound: Namespace) -> None:
    listeners = [sound.socket(family, socket.SOCK_STREAM) for family in (socket.AF_INET, socket.AF_INET6)]
    with listeners[0], listeners[1]:
        listeners[0].bind(("10.99.0.2", 10256))
        listeners[1].bind(("fd00:99::2", 10249))
        for listener in listeners:
            listener.listen()
        report = doctor(sound)
        found = sound.call(listening_sockets)
    assert {(each.address, each.port) for each in found} == {("10.99.0.2", 10256), ("fd00:99::2", 10249)}
    assert f"(pid {os.getpid()}) listens" in message(report, "PortTaken")
    assert "healthzBindAddress 0.0.0.0:10256" in message(report, "PortTaken")
    assert message(report, "PortsFree") == "nothing listens on 127.0.0.1:10249"


@pytest.fixture
def other_proxy(sound: Namespace, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program named kube-proxy in the namespace of the node."""
    program = tmp_path / "kube-proxy"
    shutil.copy(shutil.which("sleep") or "sleep", program)
    with (tmp_path / "log").open("w") as log:
        process = sound.popen([str(program), "600"], log)
    name = Path(f"/proc/{process.pid}/comm")
    wait_until(lambda: name.read_text().strip() == "kube-proxy", "setpriv executes the program")
    yield process
    process.kill()
    process.wait()


def test_running_kube_proxy(sound: Namespace, other_proxy: subprocess.Popen[str], namespaces: Any) -> None:
    report = doctor(sound)
    assert report["code"] == 1
    assert f"kube-proxy (pid {other_proxy.pid}) is running" in message(report, "OtherProxyRunning")
    elsewhere = namespaces()
    assert "OtherProxyRunning" not in severities(doctor(elsewhere))


@pytest.mark.parametrize("flag", ["--proxy-mode=nftables", "--proxy-mode=iptables"])
def test_running_kproxy(lab: Lab, tmp_path: Path, flag: str) -> None:
    objects.write(tmp_path / "objects.yaml", [objects.node()])
    with Daemon(lab, tmp_path / "objects.yaml", tmp_path / "log", flag) as daemon:
        daemon.wait_until_synced()
        report = doctor(lab.node.namespace, flag, "--hostname-override=node-1")
        other = doctor(lab.node.namespace, flag, "--healthz-bind-address=0.0.0.0:10249")
    found = severities(report)
    assert found["KproxyRunning"] == "ok"
    assert report["errors"] == 0, report
    assert not {"PortTaken", "OtherModeLeftovers", "KubeProxyLeftovers", "OtherProxyRunning"} & found.keys()
    assert "PortTaken" not in severities(other), "the port belongs to kproxy itself"


def test_interfaces(sound: Namespace) -> None:
    sound.run(["ip", "link", "add", "uplink", "mtu", "1500", "type", "veth", "peer", "name", "other"])
    sound.run(["ip", "link", "set", "uplink", "up"])
    sound.run(["ip", "link", "set", "other", "up"])
    sound.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "uplink"])
    sound.run(["ip", "route", "add", "default", "via", "192.0.2.1"])
    # Without a `dev`, the kernel does not limit the MTU to that of the uplink.
    vxlan = ["type", "vxlan", "id", "1", "dstport", "8472", "remote", "192.0.2.3"]
    sound.run(["ip", "link", "add", "flannel.1", "mtu", "1500", *vxlan])
    sound.run(["ip", "link", "set", "flannel.1", "up"])
    sound.run(["ip", "link", "add", "cni0", "type", "bridge"])
    sound.run(["ip", "link", "add", "pod", "type", "veth", "peer", "name", "peer"])
    sound.run(["ip", "link", "set", "pod", "master", "cni0"])
    sound.run(["ip", "addr", "add", "198.51.100.2/24", "dev", "other"])
    sound.run(["ip", "route", "add", "default", "via", "198.51.100.1", "metric", "10"])
    sound.sysctl(ipv4__conf__all__rp_filter=1)
    found = {link.name: link for link in sound.call(links)}
    assert found["lo"].loopback
    assert (found["flannel.1"].kind, found["flannel.1"].mtu, found["flannel.1"].up) == ("vxlan", 1500, True)
    assert found["pod"].master == found["cni0"].index
    assert sound.call(default_route_interfaces) == ("other", "uplink")
    report = doctor(sound)
    assert severities(report)["TunnelMTUTooLarge"] == "error"
    assert severities(report)["StrictReversePathFilter"] == "warning"
    bridge = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not sound.call(bridge.exists):
        assert severities(report)["BridgeNetfilterNotLoaded"] == "warning"
        return
    sound.call(lambda: bridge.write_text("0"))
    assert severities(doctor(sound))["BridgeNetfilterDisabled"] == "warning"
    sound.call(lambda: bridge.write_text("1"))
    assert "BridgeNetfilterEnabled" in severities(doctor(sound))


def test_unprivileged_user(node: Namespace) -> None:
    node.sysctl(ipv4__ip_forward=0)
    prefix = [*UNPRIVILEGED, *READ_ANY_FILE]
    report = doctor(node, prefix=prefix)
    found = severities(report)
    assert (report["complete"], report["code"]) == (False, 1)
    assert found["NotPrivileged"] == "info"
    assert found.keys() >= {"IPForwardingDisabled", "KernelRecent", "PortsFree", "ConntrackTable", "NoOtherProxy"}
    assert not {"Privileged", "ModeSupported", "OneVariant", "NoFirewallDrops", "RulesUnreadable"} & found.keys()
    node.sysctl(ipv4__ip_forward=1)
    report = doctor(node, "--proxy-mode=nftables", prefix=prefix)
    problems = {code for code, severity in severities(report).items() if severity in {"error", "warning"}}
    # Other tests may run proxies, and only root can see in which network namespace.
    assert problems <= {"OtherProxyRunning", "SeveralKproxies"}
    assert report["code"] == (1 if problems else 3)


def test_root_without_capabilities(node: Namespace) -> None:
    report = doctor(node, prefix=["setpriv", "--bounding-set=-net_admin", "--inh-caps=-all"])
    assert severities(report)["NetAdminMissing"] == "error"


def test_api_server_and_node(sound: Namespace, tmp_path: Path) -> None:
    server = sound.call(lambda: ApiServer(tokens=["secret"]).__enter__())
    try:
        status = {"addresses": [{"type": "InternalIP", "address": "10.99.0.2"}]}
        server.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "worker-7"}, "status": status})
        kubeconfig = f"--kubeconfig={server.kubeconfig(tmp_path / 'kubeconfig')}"
        report = doctor(sound, kubeconfig, "--hostname-override=worker-7")
        assert severities(report).items() >= {("APIServerReachable", "ok"), ("ClockInSync", "ok"), ("NodeFound", "ok")}
        report = doctor(sound, kubeconfig, "--hostname-override=worker-8")
        (missing,) = [each for each in report["findings"] if each["code"] == "NodeNotFound"]
        assert "--hostname-override=worker-7" in missing["action"]
    finally:
        server.stop()


def test_text_fits_100_columns_and_has_a_summary(node: Namespace) -> None:
    node.sysctl(ipv4__ip_forward=0)
    done = node.run([*COMMAND, "--proxy-mode=nftables"], check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > WIDTH] == []
    assert lines[0].startswith("Node ")
    assert lines[2].startswith("error    IPForwardingDisabled: ")
    assert lines[-1].startswith("1 error, ")


@pytest.mark.parametrize(
    ("setting", "reported"),
    [("primary", False), ("primary,localhost", True), ("all", True), ("10.0.0.0/8", False), ("fd00::/8", True)],
)
def test_route_localnet_matters_only_for_node_ports_on_localhost(
    sound: Namespace, setting: str, *, reported: bool
) -> None:
    report = doctor(sound, "--proxy-mode=iptables", f"--nodeport-addresses={setting}")
    assert ("RouteLocalnetUnset" in severities(report)) is reported


def test_mode_that_is_not_set_is_reported(sound: Namespace) -> None:
    assert severities(doctor(sound))["ModeNotSet"] == "info"
    assert "ModeNotSet" not in severities(doctor(sound, "--proxy-mode=iptables"))
