"""Contexts and warnings derived from the configuration and the Node, in both modes."""

from __future__ import annotations

import errno
import os
from typing import NoReturn

import pytest
from pyroute2 import IPRoute, NetlinkError

from kproxy.app.context_factory import ContextFactory
from kproxy.app.family_contexts import interface_warning, local_traffic_warning, make_context
from kproxy.app.node_port_addresses import depends_on_interfaces, localhost_node_ports, node_port_warning
from kproxy.config import Config, load_config
from kproxy.model.context import Context
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family, Node

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
LOCAL = ("127.0.0.1", "127.0.0.2", "10.99.0.2", "192.168.0.1", "::1", "fd00::2")
NODE = Node("node-1", addresses=("10.99.0.2", "192.168.0.1", "fd00::2"))
MODES = ("iptables", "nftables")


def configured(mode: str, text: str = "") -> Config:
    return load_config(f"{HEAD}mode: {mode}\n{text}".encode(), "kp.yaml")[0]


def context(
    mode: str, text: str = "", family: Family = Family.IPV4, node: Node | None = NODE, local: tuple[str, ...] = LOCAL
) -> Context:
    return make_context(configured(mode, text), family, "node-1", node, local, accounting=True, random_fully=True)


@pytest.mark.parametrize(("mode", "masquerade_all", "mark"), [("iptables", True, 1 << 3), ("nftables", False, 1 << 20)])
def test_masquerading_comes_from_the_section_of_the_mode(mode: str, masquerade_all: bool, mark: int) -> None:
    text = "iptables: {masqueradeAll: true, masqueradeBit: 3}\nnftables: {masqueradeAll: false, masqueradeBit: 20}"
    ctx = context(mode, text)
    assert (ctx.masquerade_all, ctx.masquerade_mark) == (masquerade_all, mark)


def test_masquerade_all_of_nftables_does_not_apply_to_iptables_mode() -> None:
    assert context("nftables", "nftables: {masqueradeAll: true}").masquerade_all
    assert not context("iptables", "nftables: {masqueradeAll: true}").masquerade_all


def test_settings_that_only_iptables_mode_has() -> None:
    iptables, nftables = context("iptables"), context("nftables")
    assert (iptables.drop_invalid, iptables.accounting, iptables.localhost_node_ports) == (True, True, True)
    assert (nftables.drop_invalid, nftables.accounting, nftables.localhost_node_ports) == (False, False, False)
    assert not context("iptables", "conntrack: {tcpBeLiberal: true}").drop_invalid


@pytest.mark.parametrize("mode", MODES)
def test_settings_that_do_not_depend_on_the_mode(mode: str) -> None:
    ctx = context(mode, "clusterCIDR: 10.244.0.0/16", node=Node("node-1", addresses=("10.99.0.2",), zone="a"))
    assert (ctx.family, ctx.node_name, ctx.zone, ctx.node_address) == (Family.IPV4, "node-1", "a", "10.99.0.2")
    assert (ctx.local_traffic.cidr, ctx.random_fully) == ("10.244.0.0/16", True)


def test_mode_that_is_not_set_means_iptables() -> None:
    assert context('""') == context("iptables")
    assert localhost_node_ports(configured('""'), Family.IPV4)


@pytest.mark.parametrize(
    ("cidrs", "family", "iptables", "nftables"),
    [
        ("[]", Family.IPV4, None, ("10.99.0.2",)),
        ("[]", Family.IPV6, None, ("fd00::2",)),
        ("[primary]", Family.IPV4, ("10.99.0.2",), ("10.99.0.2",)),
        ("[0.0.0.0/0]", Family.IPV4, None, None),
        ("['::/0']", Family.IPV6, None, None),
        ("[0.0.0.0/0]", Family.IPV6, None, None),  # no CIDR of the family: not restricted
        ("[127.0.0.0/8]", Family.IPV4, ("127.0.0.1", "127.0.0.2"), ()),
        ("['::1/128']", Family.IPV6, (), ()),
        ("[127.0.0.0/8]", Family.IPV6, None, None),
        ("[localhost]", Family.IPV4, ("127.0.0.1", "127.0.0.2"), ()),
        ("[localhost]", Family.IPV6, (), ()),
        ("[all]", Family.IPV4, None, None),
        ("[all]", Family.IPV6, None, None),
        ("[primary, localhost, 'fd00::/8']", Family.IPV4, ("10.99.0.2", "127.0.0.1", "127.0.0.2"), ("10.99.0.2",)),
        ("[localhost, primary, 'fd00::/8']", Family.IPV6, ("fd00::2",), ("fd00::2",)),
        ("[192.168.0.0/16, primary]", Family.IPV4, ("10.99.0.2", "192.168.0.1"), ("10.99.0.2", "192.168.0.1")),
        ("[primary, 10.99.0.0/24]", Family.IPV4, ("10.99.0.2",), ("10.99.0.2",)),
        ("[primary, 10.99.0.0/24]", Family.IPV6, ("fd00::2",), ("fd00::2",)),
        ("[primary, '::/0']", Family.IPV6, None, None),
        ("[primary, '::/0']", Family.IPV4, ("10.99.0.2",), ("10.99.0.2",)),
        ("[primary, localhost, all]", Family.IPV6, None, None),
        (
            "[127.0.0.0/8, 10.0.0.0/8]",
            Family.IPV4,
            ("127.0.0.1", "127.0.0.2", "10.99.0.2"),
            ("10.99.0.2",),
        ),
        ("[172.16.0.0/12]", Family.IPV4, (), ()),
    ],
)
def test_node_port_addresses(
    cidrs: str, family: Family, iptables: tuple[str, ...] | None, nftables: tuple[str, ...] | None
) -> None:
    text = f"nodePortAddresses: {cidrs}"
    assert context("iptables", text, family).node_port_addresses == iptables
    assert context("nftables", text, family).node_port_addresses == nftables


@pytest.mark.parametrize("mode", MODES)
def test_loopback_addresses_are_selected_only_if_they_can_have_node_ports(mode: str) -> None:
    text = "iptables: {localhostNodePorts: false}\nnodePortAddresses: [localhost, 10.0.0.0/8]"
    assert context(mode, text).node_port_addresses == ("10.99.0.2",)


@pytest.mark.parametrize("mode", MODES)
def test_primary_is_ignored_on_a_node_with_a_loopback_address(mode: str) -> None:
    node = Node("node-1", addresses=("127.0.0.1",))
    assert context(mode, "nodePortAddresses: [primary]", node=node).node_port_addresses is None
    text = "nodePortAddresses: [primary, 192.168.0.0/16]"
    assert context(mode, text, node=node).node_port_addresses == ("192.168.0.1",)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("setting", "depends"),
    [
        ("[]", False),
        ("[primary]", False),
        ("[primary, all]", False),
        ("[all, 10.0.0.0/8, 'fd00::/8']", False),
        ("[0.0.0.0/0, 10.0.0.0/8]", False),
        ("[0.0.0.0/0, 'fd00::/8']", True),
        ("[primary, 10.0.0.0/8]", True),
        ("[126.0.0.0/7]", True),
        ("['::1/128']", False),
    ],
)
def test_interface_addresses_matter_only_if_cidrs_select_some(mode: str, setting: str, depends: bool) -> None:
    assert depends_on_interfaces(configured(mode, f"nodePortAddresses: {setting}")) is depends


def test_loopback_addresses_of_interfaces_matter_only_if_they_can_have_node_ports() -> None:
    text = "nodePortAddresses: [primary, localhost]"
    assert depends_on_interfaces(configured("iptables", text))
    assert not depends_on_interfaces(configured("iptables", f"{text}\niptables: {{localhostNodePorts: false}}"))
    assert not depends_on_interfaces(configured("nftables", text))


@pytest.mark.parametrize("node", [None, Node("node-1")])
@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("nftables", ""),
        ("iptables", "nodePortAddresses: [primary]"),
        ("nftables", "nodePortAddresses: [primary, 172.16.0.0/12]"),
    ],
)
def test_unknown_primary_addresses_are_reported(mode: str, text: str, node: Node | None) -> None:
    ctx = context(mode, text, node=node)
    assert ctx.node_port_addresses == ()
    warning = node_port_warning(configured(mode, text), node, ctx)
    assert warning == "IPv4: NodePorts are unreachable until the addresses of Node node-1 are known"


def test_missing_addresses_of_a_single_stack_node_are_not_reported() -> None:
    node = Node("node-1", addresses=("10.99.0.2",))
    ctx = context("nftables", family=Family.IPV6, node=node)
    assert ctx.node_port_addresses == ()
    assert node_port_warning(configured("nftables"), node, ctx) == ""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", ["[primary]", "[primary, localhost]", "[localhost]"])
def test_keywords_that_select_nothing_on_a_single_stack_node_are_not_reported(mode: str, setting: str) -> None:
    node, text = Node("node-1", addresses=("10.99.0.2",)), f"nodePortAddresses: {setting}"
    ctx = context(mode, text, Family.IPV6, node)
    assert ctx.node_port_addresses == ()
    assert node_port_warning(configured(mode, text), node, ctx) == ""


@pytest.mark.parametrize(
    ("mode", "text", "family"),
    [
        ("iptables", "", Family.IPV4),
        ("nftables", "", Family.IPV4),
        ("nftables", "nodePortAddresses: [0.0.0.0/0]", Family.IPV4),
        ("nftables", "nodePortAddresses: [127.0.0.0/8, 10.0.0.0/8]", Family.IPV4),
        ("nftables", "nodePortAddresses: [127.0.0.0/8]", Family.IPV6),
        ("nftables", "nodePortAddresses: [127.0.0.0/8]", Family.IPV4),
        ("nftables", "nodePortAddresses: ['::1/128']", Family.IPV6),
        ("iptables", "nodePortAddresses: [127.0.0.0/8]", Family.IPV4),
    ],
)
def test_no_node_port_warning_if_an_address_matches(mode: str, text: str, family: Family) -> None:
    assert node_port_warning(configured(mode, text), NODE, context(mode, text, family)) == ""


LOOPBACK = "; nftables mode has no NodePorts on loopback addresses"


@pytest.mark.parametrize(
    ("mode", "cidrs", "family", "detail"),
    [
        ("iptables", "[172.16.0.0/12, 'fd00::/8']", Family.IPV4, "(172.16.0.0/12)"),
        ("nftables", "[172.16.0.0/12, 172.32.0.0/16]", Family.IPV4, "(172.16.0.0/12, 172.32.0.0/16)"),
        ("nftables", "[127.0.0.0/8]", Family.IPV4, f"(127.0.0.0/8){LOOPBACK}"),
        ("nftables", "[126.0.0.0/7]", Family.IPV4, f"(126.0.0.0/7){LOOPBACK}"),
        ("nftables", "['::1/128']", Family.IPV6, f"(::1/128){LOOPBACK}"),
        ("nftables", "[localhost, 172.16.0.0/12]", Family.IPV4, f"(localhost, 172.16.0.0/12){LOOPBACK}"),
        ("nftables", "[localhost, 172.16.0.0/12]", Family.IPV6, f"(localhost){LOOPBACK}"),
        ("iptables", "[localhost]", Family.IPV6, "(localhost); iptables mode has no NodePorts on ::1"),
    ],
)
def test_node_port_cidrs_without_a_local_address_are_reported(
    mode: str, cidrs: str, family: Family, detail: str
) -> None:
    text = f"nodePortAddresses: {cidrs}\nfeatureGates: {{KubeProxyNFTablesLocalhostNodePorts: false}}"
    warning = node_port_warning(configured(mode, text), NODE, context(mode, text, family))
    reason = "no local address is in nodePortAddresses"
    assert warning == f"{family.value}: NodePorts are unreachable: {reason} {detail}"


def test_warning_does_not_mention_loopback_in_iptables_mode() -> None:
    text = "nodePortAddresses: [127.0.0.0/8]"
    ctx = context("iptables", text, local=("10.99.0.2",))
    assert node_port_warning(configured("iptables", text), NODE, ctx).endswith(" (127.0.0.0/8)")


def test_warning_mentions_disabled_localhost_node_ports() -> None:
    text = "iptables: {localhostNodePorts: false}\nnodePortAddresses: [localhost]"
    warning = node_port_warning(configured("iptables", text), NODE, context("iptables", text))
    assert warning.endswith(" (localhost); iptables.localhostNodePorts is false")


@pytest.mark.parametrize(
    ("mode", "settings", "enabled"),
    [
        ("iptables", "", True),
        ("iptables", "iptables: {localhostNodePorts: false}", False),
        ("iptables", "nodePortAddresses: [127.0.0.0/8]", True),
        ("iptables", "nodePortAddresses: [10.0.0.0/8]", False),
        ("iptables", "nodePortAddresses: [primary]", False),
        ("iptables", "nodePortAddresses: ['fd00::/8']", True),  # no CIDR of the family: not restricted
        ("iptables", "nodePortAddresses: [primary, 'fd00::/8']", False),
        ("iptables", "nodePortAddresses: [primary, localhost]", True),
        ("iptables", "nodePortAddresses: [all]", True),
        ("iptables", "nodePortAddresses: [localhost]\niptables: {localhostNodePorts: false}", False),
        ("nftables", "", False),
        ("nftables", "nodePortAddresses: [localhost]", False),
        ("nftables", "nodePortAddresses: [0.0.0.0/0]", False),
        ("nftables", "iptables: {localhostNodePorts: true}", False),
    ],
)
def test_localhost_node_ports_need_iptables_mode_and_ipv4(mode: str, settings: str, enabled: bool) -> None:
    assert localhost_node_ports(configured(mode, settings), Family.IPV4) is enabled
    assert not localhost_node_ports(configured(mode, settings), Family.IPV6)


# Detection of local traffic


def detection_warning(text: str, family: Family, node: Node | None = NODE) -> str:
    """Return the warning about local traffic detection, which must be the same in both modes."""
    warnings = {
        local_traffic_warning(configured(mode, text), node, context(mode, text, family, node)) for mode in MODES
    }
    assert len(warnings) == 1
    return warnings.pop()


SINGLE = Node("node-1", addresses=("10.99.0.2",))
NO_CIDR = "detectLocalMode is ClusterCIDR, but no {0} clusterCIDR is set: local pod traffic is not detected"
NO_POD_CIDR = "detectLocalMode is NodeCIDR, but Node node-1 has no {0} pod CIDR: local pod traffic is not detected"
NOT_MASQUERADED = ", and off-cluster traffic to ClusterIPs is not masqueraded"


@pytest.mark.parametrize(
    ("text", "node", "warned"),
    [
        ("", NODE, ["IPv4", "IPv6"]),
        ("", SINGLE, ["IPv4"]),
        ("", Node("node-1", addresses=("fd00::2",)), ["IPv6"]),
        ("", Node("node-1"), ["IPv4"]),
        ("", None, ["IPv4"]),
        ("bindAddress: '::'", None, ["IPv6"]),
        ("clusterCIDR: 10.244.0.0/16", NODE, ["IPv6"]),
        ("clusterCIDR: 10.244.0.0/16", SINGLE, []),
        ("clusterCIDR: fd00:10::/56", SINGLE, ["IPv4"]),
        ("clusterCIDR: 'fd00:10::/56,10.244.0.0/16'", NODE, []),
        ("clusterCIDR: 10.244.0.0/16", None, []),
    ],
)
def test_family_without_cluster_cidr_is_reported(text: str, node: Node | None, warned: list[str]) -> None:
    warnings = {family.value: detection_warning(text, family, node) for family in Family}
    assert warnings == {
        name: f"{name}: {NO_CIDR.format(name)}{NOT_MASQUERADED}" if name in warned else "" for name in ("IPv4", "IPv6")
    }


@pytest.mark.parametrize(
    ("addresses", "pod_cidrs", "warned"),
    [
        (("10.99.0.2",), ("10.244.1.0/24",), []),
        (("10.99.0.2",), ("fd00:10::/64",), ["IPv4"]),
        (("10.99.0.2", "fd00::2"), ("10.244.1.0/24",), ["IPv6"]),
        (("10.99.0.2", "fd00::2"), ("10.244.1.0/24", "fd00:10::/64"), []),
    ],
)
def test_family_without_pod_cidr_is_reported(
    addresses: tuple[str, ...], pod_cidrs: tuple[str, ...], warned: list[str]
) -> None:
    node = Node("node-1", addresses=addresses, pod_cidrs=pod_cidrs)
    warnings = {family.value: detection_warning("detectLocalMode: NodeCIDR", family, node) for family in Family}
    assert warnings == {
        name: f"{name}: {NO_POD_CIDR.format(name)}{NOT_MASQUERADED}" if name in warned else ""
        for name in ("IPv4", "IPv6")
    }


def test_warning_omits_masquerading_if_everything_is_masqueraded() -> None:
    text = "iptables: {masqueradeAll: true}\nnftables: {masqueradeAll: true}"
    assert detection_warning(text, Family.IPV4) == f"IPv4: {NO_CIDR.format('IPv4')}"


@pytest.mark.parametrize("family", Family)
def test_detection_by_interface_does_not_need_a_cidr(family: Family) -> None:
    bridge = "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cbr0}"
    prefix = "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: azv}"
    assert detection_warning(bridge, family) == detection_warning(prefix, family) == ""


@pytest.mark.parametrize("mode", MODES)
def test_warning_is_logged_only_when_it_changes(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    text = "hostnameOverride: node-1\ndetectLocalMode: NodeCIDR\nnodePortAddresses: [primary]"
    contexts = ContextFactory(configured(mode, text), Family.IPV4, accounting=lambda: False, random_fully=True)
    six, both = ("fd00:10::/64",), ("fd00:10::/64", "10.244.1.0/24")
    for pod_cidrs in (six, six, both, six):
        contexts.make(Node("node-1", addresses=("10.99.0.2",), pod_cidrs=pod_cidrs))
    assert caplog.messages == [f"IPv4: {NO_POD_CIDR.format('IPv4')}{NOT_MASQUERADED}"] * 2


def test_unreadable_addresses_fail_the_sync_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(route: IPRoute) -> NoReturn:
        raise NetlinkError(errno.ENOBUFS)

    monkeypatch.setattr(IPRoute, "get_addr", reject, raising=False)
    contexts = ContextFactory(
        configured("nftables", "nodePortAddresses: [10.0.0.0/8]"),
        Family.IPV4,
        accounting=lambda: False,
        random_fully=True,
    )
    with pytest.raises(SyncError, match=f"^cannot read the addresses of this machine: {os.strerror(errno.ENOBUFS)}$"):
        contexts.make(NODE)


@pytest.mark.parametrize(
    ("mode", "interfaces", "missing"),
    [
        ("BridgeInterface", ["lo", "eth0"], "the node has no interface cbr0"),
        ("BridgeInterface", ["lo", "cbr00"], "the node has no interface cbr0"),
        ("BridgeInterface", ["lo", "cbr0"], ""),
        ("InterfaceNamePrefix", ["lo", "eazv0"], "the node has no interface with the name prefix azv"),
        ("InterfaceNamePrefix", ["lo", "azv12"], ""),
        ("ClusterCIDR", ["lo"], ""),
        ("NodeCIDR", [], ""),
    ],
)
def test_missing_pod_interfaces_are_reported(mode: str, interfaces: list[str], missing: str) -> None:
    text = f"detectLocalMode: {mode}\ndetectLocal: {{bridgeInterface: cbr0, interfaceNamePrefix: azv}}"
    warning = f"detectLocalMode {mode}: local pod traffic is not detected: {missing}"
    assert interface_warning(configured("iptables", text), interfaces) == (warning if missing else "")
