"""Rendering of plans to iptables rules: the recorded clusters, chain names, single ports, and large clusters."""

from __future__ import annotations

from base64 import b32encode
from hashlib import sha256
from typing import Any

import pytest

from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.names import ChainName, port_hash
from kproxy.iptables.render import RenderedPort, host_cidr, render_port
from kproxy.model.context import Context, LocalTraffic, local_traffic
from kproxy.model.delta import Replace
from kproxy.model.plan import plan_service
from kproxy.model.store import Store
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from tests.fakekernel import FakeKernel
from tests.inprocess import SingleFamilyProxy
from tests.recordings import SCENARIOS, comparable, config, recorded, store

OWN = {Family.IPV4: "10.99.0.2", Family.IPV6: "fd00:99::2"}
LOCAL = LocalTraffic(cidr="10.244.0.0/16")


def recorded_context(scenario: str, family: Family, cluster: Store) -> Context:
    """Return the context of a recording, from the kube-proxy configuration that it was made with."""
    settings = config(scenario)
    iptables, detect = settings.get("iptables", {}), settings.get("detectLocal", {})
    cidrs = settings.get("nodePortAddresses", [])
    restricted = cidrs == ["primary"] or (cidrs and family is Family.IPV4)
    assert cluster.node is not None
    return Context(
        family,
        "node-1",
        zone=cluster.node.zone,
        node_address=OWN[family],
        local_traffic=local_traffic(
            settings.get("detectLocalMode", "ClusterCIDR"),
            family,
            cluster_cidrs=settings["clusterCIDR"].split(","),
            pod_cidrs=cluster.node.pod_cidrs,
            bridge=detect.get("bridgeInterface", ""),
            interface_prefix=detect.get("interfaceNamePrefix", ""),
        ),
        masquerade_all=iptables.get("masqueradeAll", False),
        masquerade_mark=1 << iptables.get("masqueradeBit", 14),
        node_port_addresses=(OWN[family],) if restricted else None,
        localhost_node_ports=family is Family.IPV4 and not cidrs and iptables.get("localhostNodePorts", True),
        drop_invalid=not settings["conntrack"].get("tcpBeLiberal", False),
    )


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rules_match_the_recording(scenario: str, family: Family) -> None:
    cluster, kernel = store(scenario), FakeKernel()
    context = recorded_context(scenario, family, cluster)
    SingleFamilyProxy(IptablesBackend(kernel), context, store=cluster).sync()
    assert comparable(kernel.dump()) == recorded(scenario, family)


# Names.


@pytest.mark.parametrize(
    ("name", "protocol", "socket", "text"),
    [
        ("ns/web:http", "TCP", "", "ns/web:httptcp"),
        ("ns/web", "UDP", "", "ns/webudp"),
        ("ns/web:http", "SCTP", "10.0.0.1:80", "ns/web:httpsctp10.0.0.1:80"),
        ("ns/web:http", "TCP", "[fd00::1]:80", "ns/web:httptcp[fd00::1]:80"),
    ],
)
def test_chain_name_is_a_hash_of_port_protocol_and_endpoint(name: str, protocol: str, socket: str, text: str) -> None:
    assert port_hash(name, protocol, socket) == b32encode(sha256(text.encode()).digest()).decode()[:16]


def test_chain_names_match_kube_proxy() -> None:
    assert port_hash("demo/web:http", "TCP") == "XRY76EGRC3BSCIIJ"
    assert port_hash("demo/web:http", "TCP", "10.244.2.1:8080") == "4R2DDHFYEWMX5YSX"


def test_host_cidr_has_the_prefix_length_of_the_family() -> None:
    assert (host_cidr("10.0.0.1"), host_cidr("fd00::1")) == ("10.0.0.1/32", "fd00::1/128")


# Single ports.


def rendered(
    family: Family = Family.IPV4, endpoints: int = 1, context: dict[str, Any] | None = None, **more: Any
) -> RenderedPort:
    """Render the only port of the Service `ns/web`. Endpoint number i, from 1 on, is on node-i; this node is node-1."""
    six = family is Family.IPV6
    ports = (ServicePort("http", 80, "TCP", more.pop("node_port", 0)),)
    service = Service("ns", "web", ("fd00::1" if six else "10.96.0.1",), ports, **more)
    prefix = "fd00:1::" if six else "10.244.0."
    numbered = tuple(Endpoint(f"{prefix}{n}", f"node-{n}") for n in range(1, endpoints + 1))
    slices = [EndpointSlice("ns", "s", "ns/web", family, numbered, (EndpointPort("http", 8080, "TCP"),))]
    shared = Context(family, "node-1", **(context or {}))
    (plan,) = plan_service(service, slices, shared)
    return render_port(plan, shared)


def chain_of(port: RenderedPort, prefix: str) -> list[str]:
    """Return the rules of the only chain with this prefix, without their `-A CHAIN `."""
    (text,) = [rules for name, rules in port.chains.items() if name.startswith(prefix)]
    return [rule.split(" ", 2)[2] for rule in text.splitlines()]


def dispatch(port: RenderedPort, table: str, name: str) -> list[str]:
    """Return the rules that a port adds to a dispatch chain, without their `-A CHAIN `."""
    start = f"-A {name} "
    return [rule.removeprefix(start) for chain, rule, *_ in port.dispatch if chain == ChainName(table, name)]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_probabilities_make_all_endpoints_equally_likely(count: int) -> None:
    rules = chain_of(rendered(endpoints=count), "KUBE-SVC-")
    remaining, shares = 1.0, []
    for rule in rules[:-1]:
        probability = float(rule.split("--probability ")[1].split(" ")[0])
        shares.append(remaining * probability)
        remaining -= shares[-1]
    assert "--probability" not in rules[-1]
    assert [*shares, remaining] == pytest.approx([1 / count] * count)
    assert all(len(rule.split("--probability 0.")[1].split(" ")[0]) == 10 for rule in rules[:-1])


def test_affinity_is_checked_before_random_choice_and_set_in_the_endpoint_chain() -> None:
    port = rendered(endpoints=2, affinity_seconds=60)
    rules = chain_of(port, "KUBE-SVC-")
    assert ["--rcheck" in rule for rule in rules] == [True, True, False, False]
    assert "-m recent --rcheck --seconds 60 --reap --name KUBE-SEP-" in rules[0]
    assert "--mask 255.255.255.255 --rsource -j KUBE-SEP-" in rules[0]
    endpoint_chains = [text for name, text in port.chains.items() if name.startswith("KUBE-SEP-")]
    assert len(endpoint_chains) == 2
    assert all("-m recent --set --name KUBE-SEP-" in text.splitlines()[1] for text in endpoint_chains)


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ({}, []),
        ({"local_traffic": LOCAL}, ["! -s 10.244.0.0/16 -d 10.96.0.1/32 -p tcp"]),
        ({"local_traffic": LocalTraffic(interface="cbr0")}, ["-d 10.96.0.1/32 ! -i cbr0 -p tcp"]),
        ({"local_traffic": LocalTraffic(interface_prefix="veth")}, ["-d 10.96.0.1/32 ! -i veth+ -p tcp"]),
        ({"masquerade_all": True}, ["-d 10.96.0.1/32 -p tcp"]),
        ({"masquerade_all": True, "local_traffic": LOCAL}, ["-d 10.96.0.1/32 -p tcp"]),
    ],
)
def test_masquerading_of_traffic_to_the_cluster_ip(context: dict[str, Any], expected: list[str]) -> None:
    rules = chain_of(rendered(context=context), "KUBE-SVC-")
    assert [rule.split(" -m comment")[0] for rule in rules if rule.endswith("-j KUBE-MARK-MASQ")] == expected


def test_external_local_frontend_serves_detected_local_pods_like_the_cluster_ip() -> None:
    known = rendered(context={"local_traffic": LOCAL}, node_port=30080, external_local=True)
    unknown = rendered(node_port=30080, external_local=True)
    with_pods, without = chain_of(known, "KUBE-EXT-"), chain_of(unknown, "KUBE-EXT-")
    assert with_pods[1:] == without
    assert with_pods[0].startswith("-s 10.244.0.0/16 ")
    assert with_pods[0].rsplit("-j ", 1)[1].startswith("KUBE-SVC-")
    assert [rule.rsplit("-j ", 1)[1][:9] for rule in without] == ["KUBE-MARK", "KUBE-SVC-", "KUBE-SVL-"]
    assert all("--src-type LOCAL" in rule for rule in without[:2])


def test_external_local_service_without_local_endpoints_is_dropped() -> None:
    without_endpoints = rendered(context={"node_address": ""}, node_port=30080, external_local=True, endpoints=0)
    assert without_endpoints.chains == {}
    context = Context(Family.IPV4, "node-9")
    service = Service("ns", "web", ("10.96.0.1",), (ServicePort("http", 80, "TCP", 30080),), external_local=True)
    ports = (EndpointPort("http", 8080, "TCP"),)
    slices = [EndpointSlice("ns", "s", "ns/web", Family.IPV4, (Endpoint("10.244.0.1", "node-1"),), ports)]
    (plan,) = plan_service(service, slices, context)
    port = render_port(plan, context)
    assert not any("KUBE-SVL-" in text for text in port.chains.values())
    assert [rule.rsplit("-j ", 1)[1] for rule in dispatch(port, "filter", "KUBE-EXTERNAL-SERVICES")] == ["DROP"]


def test_firewall_accepts_the_vip_as_source_if_the_node_is_in_the_source_ranges() -> None:
    ranges = ("198.51.100.0/24", "10.99.0.0/24")
    more: dict[str, Any] = {"vips": ("203.0.113.1",), "source_ranges": ranges}
    inside = rendered(context={"node_address": "10.99.0.2"}, **more)
    outside = rendered(context={"node_address": "10.98.0.2"}, **more)

    def sources(port: RenderedPort) -> list[str]:
        return [rule.split(" ")[1] for rule in chain_of(port, "KUBE-FW-") if rule.startswith("-s ")]

    assert sources(outside) == list(ranges)
    assert sources(inside) == [*ranges, "203.0.113.1/32"]
    (drop,) = dispatch(inside, "filter", "KUBE-PROXY-FIREWALL")
    assert drop.startswith("-d 203.0.113.1/32 ")
    assert drop.endswith("-j DROP")


def test_localhost_node_ports_are_counted_if_accounting_is_available() -> None:
    def rules(**context: bool) -> list[str]:
        return dispatch(rendered(context=context, node_port=30080), "nat", "KUBE-NODEPORTS")

    counted = rules(localhost_node_ports=True)
    assert counted[0].startswith("-d 127.0.0.0/8 ")
    assert "--nfacct-name localhost_nps_accepted_pkts -j KUBE-EXT-" in counted[0]
    assert counted[1:] == rules(localhost_node_ports=False) == rules(localhost_node_ports=True, accounting=False)


def test_ipv6_rules_have_ipv6_masks_brackets_and_icmp6_rejects() -> None:
    port = rendered(Family.IPV6, affinity_seconds=60)
    assert chain_of(port, "KUBE-SVC-")[0].count("--mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource") == 1
    hairpin, dnat = chain_of(port, "KUBE-SEP-")
    assert hairpin.startswith("-s fd00:1::1/128 ")
    assert dnat.endswith("-j DNAT --to-destination [fd00:1::1]:8080")
    (reject,) = dispatch(rendered(Family.IPV6, endpoints=0), "filter", "KUBE-SERVICES")
    assert reject.startswith("-d fd00::1/128 ")
    assert reject.endswith("-j REJECT --reject-with icmp6-port-unreachable")
    (reject,) = dispatch(rendered(endpoints=0), "filter", "KUBE-SERVICES")
    assert reject.endswith("-j REJECT --reject-with icmp-port-unreachable")


# Large clusters.


def with_endpoints(count: int) -> tuple[SingleFamilyProxy, FakeKernel]:
    store, kernel = Store("node-1"), FakeKernel()
    store.apply(Replace(Service, (Service("ns", "web", ("10.96.0.1",), (ServicePort("http", 80, "TCP"),)),)))
    endpoints = tuple(Endpoint(f"10.244.{n >> 8}.{n & 255}") for n in range(count))
    ports = (EndpointPort("http", 8080, "TCP"),)
    store.apply(Replace(EndpointSlice, (EndpointSlice("ns", "s", "ns/web", Family.IPV4, endpoints, ports),)))
    store.apply(Replace(Node, ()))
    context = Context(Family.IPV4, "node-1", local_traffic=LOCAL)
    return SingleFamilyProxy(IptablesBackend(kernel), context, store=store), kernel


@pytest.mark.parametrize(("count", "commented"), [(1000, True), (1001, False)])
def test_endpoint_rules_have_no_comments_above_1000_endpoints(count: int, commented: bool) -> None:
    proxy, kernel = with_endpoints(count)
    proxy.sync()
    rules = [(name, rule) for name, rules in kernel.tables["nat"].items() for rule in rules]
    endpoint_rules = [
        rule for name, rule in rules if name.startswith("KUBE-SEP-") or (name.startswith("KUBE-SVC-") and "SEP" in rule)
    ]
    assert len(endpoint_rules) == 3 * count
    assert {"--comment" in rule for rule in endpoint_rules} == {commented}
    assert all("--comment" in rule for name, rule in rules if name == "KUBE-SERVICES" or rule.startswith("! -s"))


def test_comments_return_when_the_cluster_shrinks() -> None:
    proxy, kernel = with_endpoints(1001)
    proxy.sync()
    fresh, fresh_kernel = with_endpoints(3)
    fresh.sync()
    proxy.apply(Replace(EndpointSlice, tuple(fresh.store.slices("ns/web")))).sync()
    assert kernel.dump() == fresh_kernel.dump()
