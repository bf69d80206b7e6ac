"""`kproxy doctor` judges the facts about a node: every finding, the report and its text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from msgspec.structs import replace

from kproxy.cli.doctor import exit_code, report_lines
from kproxy.cli.output import WIDTH, ExitCode, Style, width
from kproxy.config.conntrack_sysctls import HASH_SIZE, MAX
from kproxy.diagnose import doctor, paths
from kproxy.diagnose.check_platform import kernel_version
from kproxy.diagnose.doctor import DoctorReport, doctor_report, findings
from kproxy.diagnose.facts import ApiFacts, HostFacts
from kproxy.diagnose.finding import SEVERITIES, Finding
from kproxy.diagnose.legacy_save import parse_legacy_save
from kproxy.diagnose.processes import is_kproxy, may_proxy
from kproxy.diagnose.report import document, schema
from kproxy.host.observed import BaseChain, Link
from kproxy.model.types import Family
from tests.unit import doctor_facts as host
from tests.unit.doctor_facts import SOUND

PACKAGE = Path(doctor.__file__).parent
NOT_NFT = {Family.IPV4: "Operation not supported", Family.IPV6: ""}
IPV6_MISSING = {Family.IPV4: "", Family.IPV6: "Operation not supported"}
K3S = ("/usr/local/bin/k3s", "server")
TWO_UPLINKS = (Link(6, "eth1", 1500),)
KPROXY_RUNS = {"own": (12,)}

BROKEN: list[tuple[str, str, HostFacts]] = [
    ("NotPrivileged", "info", replace(SOUND, uid=1000, net_admin=False, support={})),
    ("NetAdminMissing", "error", replace(SOUND, net_admin=False, support={})),
    ("NetRawMissing", "error", replace(host.iptables(variant="legacy"), net_raw=False)),
    ("KernelTooOld", "error", replace(SOUND, kernel="5.10.0-28-amd64")),
    ("ModeUnsupported", "error", replace(SOUND, support=NOT_NFT)),
    ("ModeUnsupported", "error", replace(host.iptables(), support=NOT_NFT)),
    ("ModeUnsupported", "error", replace(SOUND, support={Family.IPV4: "no", Family.IPV6: "no"})),
    ("IPv6Unsupported", "info", replace(SOUND, support=IPV6_MISSING)),
    ("IPv6Unsupported", "warning", replace(host.settings(ipv6=True), support=IPV6_MISSING)),
    ("IPv6Disabled", "info", replace(SOUND, ipv6_kernel=False, support={Family.IPV4: ""})),
    ("IPv6Disabled", "warning", replace(host.settings(ipv6=True), ipv6_kernel=False)),
    ("IptablesMissing", "error", host.iptables((), problem="iptables: No such file or directory")),
    ("IptablesOld", "warning", host.iptables((1, 8, 2))),
    ("ModeNotSet", "info", host.settings(mode="iptables", mode_is_set=False)),
    ("IptablesWithoutRandomFully", "info", host.iptables((1, 6, 1), variant="legacy")),
    ("NftMissing", "info", replace(SOUND, nft_version="")),
    ("OpenFilesLow", "warning", replace(SOUND, open_files=256)),
    ("OtherProxyRunning", "error", host.proxy("/usr/local/bin/kube-proxy", "--config=/x")),
    ("OtherProxyRunning", "error", host.proxy("/hyperkube", "proxy")),
    ("OtherProxyRunning", "error", host.proxy("/snap/microk8s/1/kubelite")),
    ("OtherProxyRunning", "error", host.proxy("/usr/local/bin/kube-router", "--run-firewall=true")),
    ("OtherProxyRunning", "error", host.proxy("cilium-agent", "--kube-proxy-replacement=true")),
    (
        "OtherProxyRunning",
        "error",
        host.processes(proxies=(host.process("cilium-agent", "--config-dir=/x"),), cilium_replaces=True),
    ),
    (
        "OtherProxyRunning",
        "error",
        replace(host.proxy("calico-node", "-felix"), links=(*host.LINKS, Link(9, "bpfin.cali", 1500, "veth"))),
    ),
    ("OtherProxyPossible", "warning", host.proxy(*K3S)),
    ("OtherProxyPossible", "warning", host.proxy("cilium-agent", "--config-dir=/x")),
    ("SeveralKproxies", "error", host.processes(own=(1, 2))),
    ("ProcessesHidden", "info", host.processes(all_visible=False)),
    ("KubeRouterLeftovers", "warning", host.links(Link(9, "kube-dummy-if", 1500, "dummy"))),
    ("CalicoBPFLeftovers", "warning", host.links(Link(9, "bpfin.cali", 1500, "veth"))),
    ("OtherModeLeftovers", "info", host.rules(proxies=host.services("nft"))),
    ("OtherModeLeftovers", "warning", host.rules(host.processes(**KPROXY_RUNS), proxies=host.services("nft"))),
    ("OtherModeLeftovers", "info", host.rules(host.iptables(), proxies=host.services("table"))),
    ("KubeProxyLeftovers", "info", host.rules(proxies=host.services("table"))),
    ("KubeProxyLeftovers", "info", host.rules(host.iptables(), proxies=host.services("nft"))),
    ("IPVSLeftovers", "info", host.rules(ipvs_interface=True, ipsets=14)),
    ("IPVSLeftovers", "warning", host.rules(host.processes(**KPROXY_RUNS), ipsets=1)),
    ("ServiceRulesInBothVariants", "error", host.rules(proxies=host.services("nft", "legacy"))),
    ("ServiceRulesInOtherVariant", "error", host.rules(proxies=host.services("legacy"))),
    ("ServiceRulesInOtherVariant", "error", host.rules(host.iptables(), proxies=host.services("legacy"))),
    ("ServiceRulesInOtherVariant", "error", host.rules(host.iptables(variant="legacy"), proxies=host.services("nft"))),
    ("KubeletUsesOtherVariant", "warning", host.rules(host.iptables(), kubelet=frozenset(["legacy"]))),
    ("RulesInBothVariants", "warning", host.rules(variants=frozenset(["nft", "legacy"]))),
    ("RulesUnreadable", "info", host.rules(unreadable="iptables-legacy-save: No such file or directory")),
    ("FirewallDropsEverything", "error", host.chain(accepts=False)),
    ("FirewallDropsEverything", "error", host.chain("output", accepts=False, policy="accept", final="reject")),
    ("FirewallAtForward", "warning", host.chain(jumps=("ufw-before-forward",))),
    ("FirewallAtForward", "warning", host.chain(jumps=("DOCKER-USER",), legacy=True)),
    ("FirewallAtForward", "warning", host.chain(table="firewalld", policy="accept", final="reject")),
    ("FirewallAtOutput", "warning", host.chain("output")),
    ("FirewallAtInput", "info", host.chain("input", jumps=("ufw-before-input",))),
    ("FirewallAtInput", "info", host.chain("prerouting")),
    ("FirewallWithPlugin", "info", host.chain(jumps=("cali-FORWARD", "DOCKER-USER"))),
    ("FirewallWithPlugin", "info", host.chain(jumps=("CILIUM_FORWARD",))),
    ("FirewallWithPlugin", "info", host.chain(jumps=("FLANNEL-FWD",))),
    ("IPForwardingDisabled", "error", host.parameters(IP_FORWARD=0)),
    ("IPv6ForwardingDisabled", "error", host.parameters(host.settings(ipv6=True), IPV6_FORWARDING=0)),
    (
        "IPv6ForwardingDisabled",
        "error",
        host.parameters(host.api(node=replace(host.NODE, pod_cidrs=("fd00::/64",))), IPV6_FORWARDING=0),
    ),
    ("BridgeNetfilterNotLoaded", "warning", host.parameters(BRIDGE_IPTABLES=None, BRIDGE_IP6TABLES=None)),
    ("BridgeNetfilterDisabled", "warning", host.parameters(BRIDGE_IPTABLES=0)),
    ("BridgeNetfilterDisabled", "warning", host.parameters(host.settings(ipv6=True), BRIDGE_IP6TABLES=0)),
    (
        "RouteLocalnetUnset",
        "info",
        replace(host.settings(mode="iptables", localhost_node_ports=True), writable=frozenset([paths.ROUTE_LOCALNET])),
    ),
    ("RouteLocalnetReadOnly", "warning", host.settings(mode="iptables", localhost_node_ports=True)),
    ("RouteLocalnetExposed", "warning", host.parameters(ROUTE_LOCALNET=1)),
    (
        "StrictReversePathFilter",
        "warning",
        replace(
            host.links(*TWO_UPLINKS),
            default_interfaces=("eth0", "eth1"),
            parameters=host.PARAMETERS | {paths.reverse_path("all"): 0, paths.reverse_path("eth1"): 1},
        ),
    ),
    ("ConntrackTableFull", "error", host.parameters(CONNTRACK_COUNT=125000)),
    ("ConntrackTableFilling", "warning", host.parameters(CONNTRACK_COUNT=100000)),
    ("ConntrackDropped", "info", replace(SOUND, conntrack_drops=7)),
    ("ConntrackLimitUnset", "info", replace(host.settings(conntrack={MAX: 262144}), writable=frozenset([MAX]))),
    ("ConntrackLimitUnset", "info", replace(host.settings(conntrack={MAX: 262144}), uid=1000)),
    ("ConntrackLimitLow", "warning", host.settings(conntrack={MAX: 262144})),
    ("ConntrackBucketsFew", "info", replace(SOUND, parameters=host.PARAMETERS | {HASH_SIZE: 4096})),
    ("TunnelMTUTooLarge", "error", host.links(replace(host.TUNNEL, mtu=1480))),
    ("PodMTUTooLarge", "warning", host.links(replace(host.POD, mtu=1500))),
    (
        "UplinkMTUsDiffer",
        "info",
        replace(host.links(Link(6, "eth1", 9000)), default_interfaces=("eth0", "eth1")),
    ),
    ("APIServerNotConfigured", "info", replace(SOUND, api=ApiFacts())),
    ("APIServerThroughService", "error", host.api(host="10.96.0.1", server="https://10.96.0.1:443")),
    ("APIServerThroughService", "error", host.api(host="kubernetes.default.svc")),
    ("APIServerThroughService", "error", host.api(host="10.96.0.1", in_cluster=True, answered=False, problem="x")),
    ("APIServerThroughService", "error", host.api(host="fd00::1", in_cluster=True, answered=False, problem="x")),
    ("APIServerUnreachable", "error", host.api(answered=False, node=None, problem="Connection refused")),
    ("APIServerSlow", "warning", host.api(answered=False, node=None, problem="no answer within 1 s", slow=True)),
    ("APIConfigurationInvalid", "error", host.api(answered=False, server="", host="", problem="no such file")),
    ("APIAccessDenied", "error", host.api(denied=("list nodes: 403",))),
    ("APIServerFails", "error", host.api(failed=("list nodes: 503",))),
    ("ClockSkew", "warning", host.api(clock_offset=42.0)),
    ("ClockSkew", "error", host.api(clock_offset=-3600.0)),
    ("NodeNotFound", "error", host.api(node=None, node_missing=True)),
    ("NodeNotFound", "error", host.api(node=None, node_missing=True, similar=("node-1.example.com",))),
    ("NodeWithoutAddress", "warning", host.api(node=replace(host.NODE, addresses=()))),
    ("NodeAddressNotLocal", "warning", host.api(node=replace(host.NODE, addresses=("192.0.2.12",)))),
    (
        "NodeWithoutPodCIDR",
        "error",
        replace(
            host.api(node=replace(host.NODE, pod_cidrs=())), settings=replace(host.SETTINGS, local_mode="NodeCIDR")
        ),
    ),
    ("PodInterfaceMissing", "warning", host.settings(local_mode="BridgeInterface", pod_bridge="cbr0")),
    ("PodInterfaceMissing", "warning", host.settings(local_mode="InterfaceNamePrefix", pod_prefix="cali")),
    ("ClusterCIDRUnset", "info", host.settings(cluster_cidrs=())),
    ("PodCIDROutsideClusterCIDR", "warning", host.settings(cluster_cidrs=("fd00::/48", "10.0.0.0/16"))),
    ("PortTaken", "error", host.listening("0.0.0.0", 10249)),
    ("PortTaken", "error", host.listening("::", 10256, pid=815)),
    ("PortTaken", "error", host.listening("192.0.2.11", 10256, pid=815, own=(12,))),
]
"""Reason codes with their severities, and facts that cause them."""

SOUND_VARIANTS = {
    "nftables mode": SOUND,
    "iptables mode": host.iptables(),
    "iptables-legacy": host.rules(
        host.iptables(variant="legacy"), variants=frozenset(["legacy"]), kubelet=frozenset(["legacy"])
    ),
    "kproxy runs": host.rules(host.listening("0.0.0.0", 10256, pid=12, own=(12,)), proxies=host.services("table")),
    "Cilium without kube-proxy replacement": host.processes(
        proxies=(host.process("cilium-agent", "--config-dir=/x"),), cilium_replaces=False
    ),
    "kube-router as network plugin": host.proxy("kube-router", "--run-service-proxy=false"),
    "Calico without eBPF": host.proxy("calico-node", "-felix"),
    "the table of kproxy": host.rules(proxies=host.services("table", own=True)),
    "a chain that accepts": host.chain(policy="accept"),
    "a chain that ends with accept": host.chain(final="accept"),
    "another address's port": host.listening("192.0.2.11", 10249),
    "no bridge": host.links(replace(host.POD, master=0)),
    "Docker's bridge, without br_netfilter": host.parameters(
        host.links(Link(3, "docker0", 1500, "bridge"), replace(host.POD, mtu=1500)),
        BRIDGE_IPTABLES=None,
        BRIDGE_IP6TABLES=None,
    ),
    "Cilium's tunnel": host.links(Link(5, "cilium_vxlan", 1500, "vxlan")),
    "strict, but one way": replace(SOUND, parameters=host.PARAMETERS | {paths.reverse_path("all"): 1}),
    "no limits": replace(SOUND, open_files=None),
    "IPv6 is unused": host.parameters(IPV6_FORWARDING=0),
    "NodeCIDR": host.settings(local_mode="NodeCIDR"),
    "an interface of pods": host.settings(local_mode="InterfaceNamePrefix", pod_prefix="veth"),
    "a bridge of pods": host.settings(local_mode="BridgeInterface", pod_bridge="cni0"),
    "one family in clusterCIDR": host.api(node=replace(host.NODE, pod_cidrs=("10.244.1.0/24", "fd00::/64"))),
    "IPv6 is used": host.settings(ipv6=True),
    "NodePorts on 127.0.0.1": host.parameters(
        host.settings(mode="iptables", localhost_node_ports=True), ROUTE_LOCALNET=1
    ),
}


def troubles(facts: HostFacts) -> list[Finding]:
    return [each for each in findings(facts) if each.severity != "ok"]


@pytest.mark.parametrize(("code", "severity", "facts"), BROKEN, ids=[f"{row[0]}-{row[1]}" for row in BROKEN])
def test_problem_is_found(code: str, severity: str, facts: HostFacts) -> None:
    found = troubles(facts)
    assert (code, severity) in [(each.code, each.severity) for each in found]
    # Nothing else is suspected, except what follows from the same facts.
    assert len({each.code for each in found}) <= 2, found


@pytest.mark.parametrize("name", SOUND_VARIANTS)
def test_sound_node_has_no_problems(name: str) -> None:
    assert troubles(SOUND_VARIANTS[name]) == []


def declared_codes() -> set[str]:
    """Return the first argument of every call that makes a finding."""
    makers = {"error", "warning", "info", "passed", "make"}
    return {
        node.args[0].value
        for path in PACKAGE.glob("check_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (isinstance(node.func, ast.IfExp) or (isinstance(node.func, ast.Name) and node.func.id in makers))
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    }


def test_every_reason_code_is_tested_and_in_camel_case() -> None:
    computed = {"FirewallAtForward", "FirewallAtOutput"}  # by hook
    declared = declared_codes() | computed
    reached = {row[0] for row in BROKEN} | {each.code for facts in SOUND_VARIANTS.values() for each in findings(facts)}
    assert declared == reached
    assert len(declared) > 60
    assert [code for code in declared if not re.fullmatch(r"[A-Z][A-Za-z0-9]+", code)] == []


def test_documentation_lists_every_error_and_warning() -> None:
    page = (PACKAGE.parents[1] / "docs/troubleshooting.md").read_text()
    section = page.split("\n## Check the node\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"`([A-Z]\w+)`", section.split("| --- | --- |")[1]))
    assert documented == {code for code, severity, _ in BROKEN if severity in {"error", "warning"}}


def test_worst_findings_come_first() -> None:
    facts = replace(host.parameters(IP_FORWARD=0, CONNTRACK_COUNT=100000), nft_version="")
    severities = [each.severity for each in findings(facts)]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert set(severities) == set(SEVERITIES)


def test_every_error_and_warning_says_what_to_do() -> None:
    for _, _, facts in BROKEN:
        for each in troubles(facts):
            assert each.action or each.severity == "info", each


@pytest.mark.parametrize("facts", [row[2] for row in BROKEN] + list(SOUND_VARIANTS.values()))
def test_report_matches_its_schema(facts: HostFacts) -> None:
    Draft202012Validator(schema(DoctorReport)).validate(document(doctor_report(facts)))


def text(facts: HostFacts, *, colored: bool = False) -> list[str]:
    return list(report_lines(doctor_report(facts), Style(colored)))


@pytest.mark.parametrize("facts", [row[2] for row in BROKEN])
def test_text_fits_100_columns(facts: HostFacts) -> None:
    for colored in (False, True):
        assert [line for line in text(facts, colored=colored) if width(line) > WIDTH] == []


@given(st.text(max_size=400))
def test_text_of_any_names_fits_and_has_no_control_characters(name: str) -> None:
    facts = replace(
        host.api(node=None, node_missing=True, similar=(name,), problem=name),
        settings=replace(host.SETTINGS, node_name="node-1"),
        rules=replace(SOUND.rules, base_chains=(BaseChain("ip", name, name, "forward", 0, "drop"),)),
    )
    for line in text(facts):
        assert len(line) <= WIDTH
        assert line.isprintable()


def test_text_of_a_report() -> None:
    facts = replace(host.parameters(IP_FORWARD=0), api=ApiFacts(), nft_version="")
    lines = text(facts)
    assert lines[:6] == [
        "Node node-1: nftables mode, Linux 6.1.0-18-amd64",
        "",
        "error    IPForwardingDisabled: net.ipv4.ip_forward is 0: connections to Services do not reach pods",
        "           or other nodes",
        "         -> set net.ipv4.ip_forward=1 with sysctl -w, and in a file in /etc/sysctl.d",
        "info     NftMissing: the program nft is not installed; kproxy uses netlink and does not need it",
    ]
    assert lines[-1] == "1 error, 2 for information, 12 passed"


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (SOUND, ExitCode.WORKS),
        (replace(SOUND, nft_version=""), ExitCode.WORKS),
        (host.parameters(IP_FORWARD=0), ExitCode.BROKEN),
        (replace(SOUND, open_files=256), ExitCode.BROKEN),
        (replace(SOUND, uid=1000, net_admin=False, support={}), ExitCode.UNKNOWN),
        (replace(host.parameters(IP_FORWARD=0), uid=1000, net_admin=False), ExitCode.BROKEN),
    ],
)
def test_exit_codes(facts: HostFacts, code: ExitCode) -> None:
    assert exit_code(doctor_report(facts)) is code


def test_unprivileged_user_gets_one_line_about_it_and_all_other_checks() -> None:
    facts = replace(host.parameters(IP_FORWARD=0), uid=1000, net_admin=False, net_raw=False, support={})
    codes = [each.code for each in findings(facts)]
    assert codes[:2] == ["IPForwardingDisabled", "NotPrivileged"]
    assert {"KernelRecent", "NodeFound", "APIServerReachable", "PortsFree", "MTUsConsistent"} <= set(codes)
    assert not {"Privileged", "ModeSupported", "OneVariant", "NoFirewallDrops"} & set(codes)
    assert text(facts)[-1].endswith("; some checks need root")


def test_missing_node_is_found_by_an_address_of_this_machine() -> None:
    (finding,) = troubles(host.api(node=None, node_missing=True, similar=("node-1.example.com",)))
    assert finding.action == "set --hostname-override=node-1.example.com: that Node has an address of this machine"


def test_invalid_configuration_does_not_hide_the_address_of_the_service() -> None:
    facts = host.api(server="", host="10.96.0.1", in_cluster=True, answered=False, problem="no token", node=None)
    assert [each.code for each in troubles(facts)] == ["APIServerThroughService", "APIConfigurationInvalid"]


def test_port_of_a_stranger_is_named_with_its_process() -> None:
    (finding,) = troubles(host.listening("::", 10256, pid=815))
    assert finding.message == "healthzBindAddress 0.0.0.0:10256: nginx (pid 815) listens on this port"
    assert finding.action == "stop it, or set --healthz-bind-address to another port"


def test_one_chain_in_both_families_is_one_finding() -> None:
    chains = tuple(BaseChain(family, "filter", "FORWARD", "forward", 0, "drop") for family in ("ip", "ip6"))
    assert [each.code for each in troubles(host.rules(base_chains=chains))] == ["FirewallDropsEverything"]


@pytest.mark.parametrize(
    ("release", "version"), [("6.1.0-18-amd64", (6, 1)), ("5.4.17-2136.el8uek", (5, 4)), ("odd", (0, 0))]
)
def test_kernel_versions(release: str, version: tuple[int, int]) -> None:
    assert kernel_version(release) == version


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("/venv/bin/python /venv/bin/kproxy run --config=x", True),
        ("python3 -m kproxy run", True),
        ("/kproxy run --cleanup", False),
        ("/kproxy doctor", False),
        ("vi kproxy run.txt", False),
    ],
)
def test_daemons_of_kproxy_are_recognized(words: str, expected: bool) -> None:
    assert is_kproxy(host.process(*words.split())) is expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("/usr/local/bin/kube-proxy --config=x", True),
        ("/usr/local/bin/kube-proxy-helper", False),
        ("k3s server", True),
        ("/bin/sh -c kube-proxy", False),
        ("/hyperkube kubelet", False),
    ],
)
def test_other_proxies_are_recognized(words: str, expected: bool) -> None:
    assert may_proxy(host.process(*words.split())) is expected


LEGACY = """\
# Generated by iptables-save v1.8.9
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [12:3456]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -m comment --comment "reject the rest -j ACCEPT" -j REJECT --reject-with icmp-port-unreachable
-A INPUT -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -s 10.0.0.0/8 -j DROP
-A OUTPUT -m conntrack --ctstate INVALID -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
COMMIT
"""


def test_rules_of_iptables_legacy_are_summarized() -> None:
    rules = parse_legacy_save(LEGACY.splitlines(keepends=True), "ip")
    assert rules.chains == (("filter", "DOCKER-USER"), ("nat", "KUBE-SERVICES"))
    assert rules.rules == 7
    assert rules.base == (
        BaseChain("ip", "filter", "INPUT", "input", 0, "accept", "reject", accepts=True, legacy=True),
        BaseChain("ip", "filter", "FORWARD", "forward", 0, "drop", "", True, ("DOCKER-USER",), legacy=True),
        BaseChain("ip", "filter", "OUTPUT", "output", 0, "accept", legacy=True),
    )
    assert [chain.drops_rest for chain in rules.base] == [True, True, False]


def codes(found: Iterable[Finding]) -> set[str]:
    return {each.code for each in found}


def test_leftovers_are_not_reported_while_kube_proxy_runs() -> None:
    running = host.rules(host.proxy("kube-proxy"), proxies=host.services("nft"), ipvs_interface=False)
    assert codes(troubles(running)) == {"OtherProxyRunning"}
