"""Real traffic in nftables mode: cases that test_traffic.py does not cover or that differ between the modes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.client import Answered, Refused
from tests.lab.continuous_requests import count_by_pod
from tests.lab.modes import mode_flag
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import NODE_ADDRESSES, OUTSIDE_ADDRESSES, Host, Lab
from tests.lab.waiting import wait_until
from tests.lab.web_service import CLUSTER_IPS, EXTERNAL_IPS, LOAD_BALANCER_IPS, NODE_PORT, WebService

UNUSED = {4: "10.96.0.99", 6: "fd00:10:96::99"}
SECOND = {4: "10.99.0.7", 6: "fd00:99::7"}
SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/108")

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])
PROTOCOLS = pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])


@pytest.fixture
def protocol() -> str:
    return "TCP"


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path, protocol: str) -> WebService:
    if absent := missing_protocol(protocol):
        pytest.skip(absent)
    folder = tmp_path / "objects"
    folder.mkdir()
    return WebService(lab, servers, folder, protocol)


def seen(pod: Host, source: str) -> Answered:
    return Answered(pod.name, source)


@PROTOCOLS
@VERSIONS
def test_all_frontends_are_reachable_from_pods_clients_and_the_node(
    web: WebService, version: int, protocol: str
) -> None:
    pod = web.pod(1)
    web.apply_service([pod])
    node, client = web.node.address(version), web.client.address(version)
    assert web.send_request(web.client, CLUSTER_IPS[version]) == seen(pod, client)
    assert web.send_request(web.outsider, CLUSTER_IPS[version]) == seen(pod, node)
    assert web.send_request(web.node, CLUSTER_IPS[version]) == seen(pod, node)
    for frontend in web.external(version):
        for origin in (web.client, web.outsider, web.node):
            assert web.send_request(origin, *frontend) == seen(pod, node), (frontend, origin.name)


@pytest.mark.parametrize("affinity", ["None", "ClientIP"])
@PROTOCOLS
@VERSIONS
def test_hairpin_traffic_is_masqueraded_and_other_pod_traffic_is_not(
    web: WebService, version: int, protocol: str, affinity: str
) -> None:
    pod = web.pod(1)
    node = web.node.address(version)
    web.apply_service([pod], sessionAffinity=affinity)
    for frontend in web.frontends(version):
        assert web.send_request(pod, *frontend) == seen(pod, node), frontend
    other = web.pod(2)
    web.apply_service([pod, other])
    assert web.outcomes(pod, CLUSTER_IPS[version]) == {seen(pod, node), seen(other, pod.address(version))}


@pytest.mark.parametrize("affinity", ["None", "ClientIP"])
@VERSIONS
def test_hairpin_works_without_node_name_in_the_slices(web: WebService, version: int, affinity: str) -> None:
    """Hand-written EndpointSlices and those mirrored from Endpoints have no nodeName."""
    pod = web.pod(1)
    slices = web.slices("web", [pod])
    for each in slices:
        for endpoint in each["endpoints"]:
            del endpoint["nodeName"]
    web.apply([web.service("web", *CLUSTER_IPS.values(), sessionAffinity=affinity), *slices])
    assert web.send_request(pod, CLUSTER_IPS[version]) == seen(pod, web.node.address(version))


@VERSIONS
def test_former_endpoint_is_no_longer_masqueraded_as_hairpin(lab: Lab, web: WebService, version: int) -> None:
    pod, other = web.pod(1), web.pod(2)
    web.apply_service([pod, other])
    web.apply_service([other])
    assert web.send_request(pod, CLUSTER_IPS[version]) == seen(other, pod.address(version))
    family = "ip6" if version == 6 else "ip"
    hairpins = lab.node.namespace.run(["nft", "list", "set", family, "kube-proxy", "hairpin-connections"]).stdout
    assert other.address(version) in hairpins
    assert f"{pod.address(version)} ." not in hairpins


@PROTOCOLS
@VERSIONS
def test_external_policy_local_uses_local_endpoints_and_keeps_the_source(
    web: WebService, version: int, protocol: str
) -> None:
    local, remote = web.pod(1), web.pod(2, "node-2")
    web.apply_service([local, remote], externalTrafficPolicy="Local")
    outsider, client, node = (each.address(version) for each in (web.outsider, web.client, web.node))
    for frontend in web.external(version):
        assert web.outcomes(web.outsider, *frontend) == {seen(local, outsider)}, frontend
        assert web.outcomes(web.client, *frontend) == {seen(local, client), seen(remote, client)}, frontend
        assert web.outcomes(web.node, *frontend) == {seen(local, node), seen(remote, node)}, frontend


@VERSIONS
def test_external_policy_local_without_local_endpoints_drops_external_traffic(web: WebService, version: int) -> None:
    remote = web.pod(2, "node-2")
    web.apply_service([remote], externalTrafficPolicy="Local")
    client, node = web.client.address(version), web.node.address(version)
    for frontend in web.external(version):
        assert web.drops(web.outsider, *frontend), frontend
        assert web.send_request(web.client, *frontend) == seen(remote, client), frontend
        assert web.send_request(web.node, *frontend) == seen(remote, node), frontend


@VERSIONS
def test_external_policy_local_masquerades_a_node_that_owns_the_address(
    lab: Lab, web: WebService, version: int
) -> None:
    own = f"{EXTERNAL_IPS[version]}/{128 if version == 6 else 32}"
    lab.node.namespace.run(["ip", "address", "add", own, "dev", "eth0", *_nodad(own)])
    remote = web.pod(2, "node-2")
    web.apply_service([remote], externalTrafficPolicy="Local")
    assert web.send_request(web.node, EXTERNAL_IPS[version]) == seen(remote, web.node.address(version))


@PROTOCOLS
@VERSIONS
def test_internal_policy_local_uses_local_endpoints(web: WebService, version: int, protocol: str) -> None:
    local, remote = web.pod(1), web.pod(2, "node-2")
    client, node = web.client.address(version), web.node.address(version)
    web.apply_service([local, remote], internalTrafficPolicy="Local")
    assert web.outcomes(web.client, CLUSTER_IPS[version]) == {seen(local, client)}
    assert web.outcomes(web.node, CLUSTER_IPS[version]) == {seen(local, node)}
    assert web.outcomes(web.client, EXTERNAL_IPS[version]) == {seen(local, node), seen(remote, node)}


@PROTOCOLS
@VERSIONS
def test_internal_policy_local_without_local_endpoints_drops(web: WebService, version: int, protocol: str) -> None:
    remote = web.pod(2, "node-2")
    web.apply_service([remote], internalTrafficPolicy="Local")
    assert web.drops(web.client, CLUSTER_IPS[version])
    assert web.drops(web.node, CLUSTER_IPS[version])
    assert web.send_request(web.outsider, EXTERNAL_IPS[version]) == seen(remote, web.node.address(version))


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
@VERSIONS
def test_service_with_an_address_of_the_node_takes_over_only_its_port(
    lab: Lab, servers: Servers, web: WebService, version: int, mode: str
) -> None:
    pod = web.pod(1)
    servers.serve(web.node, 9090)
    own = [*NODE_ADDRESSES]
    for spec in ({"cluster_ips": own}, {"externalIPs": own}, {"load_balancer_ips": own, "type": "LoadBalancer"}):
        addresses = spec.pop("cluster_ips", [*CLUSTER_IPS.values()])
        web.apply([web.service("web", *addresses, **spec), *web.slices("web", [pod])], mode_flag(mode))
        for origin in (web.node, web.client, web.outsider):
            assert web.send_request(origin, own[version == 6], 9090) == seen(web.node, origin.address(version)), spec
            outcome = web.send_request(origin, own[version == 6])
            assert isinstance(outcome, Answered)
            assert outcome.pod == pod.name


@VERSIONS
def test_service_whose_cluster_ip_becomes_an_address_of_the_node_does_not_hide_its_servers(
    lab: Lab, servers: Servers, web: WebService, version: int
) -> None:
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [web.pod(1)])])
    assert web.refuses(web.node, CLUSTER_IPS[version], 9090)
    own = f"{CLUSTER_IPS[version]}/{128 if version == 6 else 32}"
    lab.node.namespace.run(["ip", "address", "add", own, "dev", "eth0", *_nodad(own)])
    servers.serve(Host("own", web.node.namespace, (CLUSTER_IPS[version],)), 9090)
    # The kernel adds the local route of a new IPv6 address a moment later.
    wait_until(lambda: isinstance(web.send_request(web.node, CLUSTER_IPS[version], 9090), Answered), "the local route")
    assert isinstance(web.send_request(web.client, CLUSTER_IPS[version], 9090), Answered)


@VERSIONS
def test_service_cidr_that_contains_the_address_of_the_node_does_not_hide_its_servers(
    servers: Servers, web: WebService, version: int
) -> None:
    overlapping = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "overlapping"},
        "spec": {"cidrs": ["10.99.0.0/16", "fd00:99::/108"]},
    }
    servers.serve(web.node, 9090)
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [web.pod(1)]), overlapping])
    for origin in (web.node, web.client, web.outsider):
        assert isinstance(web.send_request(origin, web.node.address(version), 9090), Answered), origin.name


@VERSIONS
def test_endpoint_in_a_service_cidr_is_reachable(lab: Lab, servers: Servers, web: WebService, version: int) -> None:
    """The endpoint has an address in the network of the node, as the API server often has."""
    overlapping = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "overlapping"},
        "spec": {"cidrs": ["10.99.0.0/16", "fd00:99::/108"]},
    }
    servers.serve(lab.outside, 8080)
    web.apply([web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [lab.outside]), overlapping])
    for origin in (web.node, web.client):
        outcome = web.send_request(origin, CLUSTER_IPS[version])
        assert isinstance(outcome, Answered), (origin.name, outcome)
        assert outcome.pod == lab.outside.name
    assert web.drops(web.client, OUTSIDE_ADDRESSES[version == 6], 8080), "kproxy knows no Service with this address"


@PROTOCOLS
@VERSIONS
def test_all_frontends_reject_without_endpoints(web: WebService, version: int, protocol: str) -> None:
    web.apply_service([])
    for frontend in web.frontends(version):
        for origin in (web.client, web.outsider, web.node):
            assert web.refuses(origin, *frontend), (frontend, origin.name)


@VERSIONS
def test_source_ranges_restrict_the_load_balancer_ip(lab: Lab, web: WebService, version: int) -> None:
    pod = web.pod(1)
    other = lab.add_client("other", "192.0.2.50", "2001:db8:99::50")
    ranges = {4: "198.51.100.0/24", 6: "2001:db8:51::/64"}
    web.apply_service([pod], loadBalancerSourceRanges=[*ranges.values()])
    node = web.node.address(version)
    assert web.send_request(web.outsider, LOAD_BALANCER_IPS[version]) == seen(pod, node)
    for origin in (other, web.client, web.node):
        assert web.drops(origin, LOAD_BALANCER_IPS[version]), origin.name
    for frontend in ((CLUSTER_IPS[version], 80), (EXTERNAL_IPS[version], 80), (node, NODE_PORT)):
        assert web.send_request(other, *frontend) == seen(pod, node), frontend


@pytest.mark.parametrize("assigned", [False, True], ids=["not-on-the-node", "on-the-node"])
@VERSIONS
def test_node_in_the_source_ranges_can_use_the_load_balancer_ip(
    lab: Lab, web: WebService, version: int, assigned: bool
) -> None:
    pod = web.pod(1)
    ranges = {4: "10.99.0.0/24", 6: "fd00:99::/64"}
    length = "128" if version == 6 else "32"
    if assigned:
        own = f"{LOAD_BALANCER_IPS[version]}/{length}"
        lab.node.namespace.run(["ip", "address", "add", own, "dev", "eth0", *_nodad(own)])
    web.apply_service([pod], loadBalancerSourceRanges=[*ranges.values()])
    assert web.send_request(web.node, LOAD_BALANCER_IPS[version]) == seen(pod, web.node.address(version))
    source = LOAD_BALANCER_IPS[version] if assigned else web.node.address(version)
    assert web.send_request(web.node, LOAD_BALANCER_IPS[version], source=source) == seen(pod, web.node.address(version))
    assert web.drops(web.outsider, LOAD_BALANCER_IPS[version])


@VERSIONS
def test_source_ranges_apply_with_policy_local(web: WebService, version: int) -> None:
    local, remote = web.pod(1), web.pod(2, "node-2")
    ranges = {4: "198.51.100.0/24", 6: "2001:db8:51::/64"}
    web.apply_service([local, remote], loadBalancerSourceRanges=[*ranges.values()], externalTrafficPolicy="Local")
    assert web.outcomes(web.outsider, LOAD_BALANCER_IPS[version]) == {seen(local, web.outsider.address(version))}
    assert web.drops(web.client, LOAD_BALANCER_IPS[version])


@pytest.mark.parametrize(
    ("setting", "answering"),
    [
        ("", {"primary"}),
        ("primary", {"primary"}),
        ("10.99.0.7/32,fd00:99::7/128", {"second"}),
        ("0.0.0.0/0,::/0", {"primary", "second"}),
    ],
    ids=["default", "primary", "cidrs", "all"],
)
@VERSIONS
def test_node_ports_answer_on_configured_addresses_but_not_on_loopback(
    lab: Lab, web: WebService, version: int, setting: str, answering: set[str]
) -> None:
    pod = web.pod(1)
    node = lab.node.namespace
    for address, length in ((SECOND[4], 24), (SECOND[6], 64)):
        node.run(["ip", "address", "add", f"{address}/{length}", "dev", "eth0", *_nodad(address)])
    found = [web.service("web", *CLUSTER_IPS.values(), type="NodePort"), *web.slices("web", [pod])]
    web.apply(found, *([f"--nodeport-addresses={setting}"] if setting else []))
    addresses = {"primary": web.node.address(version), "second": SECOND[version]}
    for name, address in addresses.items():
        for origin in (web.outsider, web.node):
            outcome = web.send_request(origin, address, NODE_PORT)
            assert isinstance(outcome, Answered) == (name in answering), (name, origin.name)
    assert web.send_request(web.node, {4: "127.0.0.1", 6: "::1"}[version], NODE_PORT) == Refused()
    cluster_ip = CLUSTER_IPS[version]
    assert web.refuses(web.client, cluster_ip, NODE_PORT), "the NodePort must not be open on the ClusterIP"


def _nodad(address: str) -> list[str]:
    return ["nodad"] if ":" in address else []


@PROTOCOLS
@VERSIONS
def test_other_ports_of_a_cluster_ip_are_rejected(web: WebService, version: int, protocol: str) -> None:
    web.apply_service([web.pod(1)])
    for origin in (web.client, web.node, web.outsider):
        assert web.refuses(origin, CLUSTER_IPS[version], 81), origin.name


@PROTOCOLS
@VERSIONS
def test_unused_addresses_of_the_service_cidr_are_dropped(
    lab: Lab, servers: Servers, web: WebService, version: int, protocol: str
) -> None:
    cidr = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [*SERVICE_CIDRS]},
    }
    pod = web.pod(1)
    found = [web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [pod])]
    elsewhere = lab.add_pod("elsewhere", *UNUSED.values(), node="elsewhere")
    servers.serve(elsewhere, 80, protocol)
    web.apply(found)
    answer = web.send_request(web.client, UNUSED[version])
    assert answer == seen(elsewhere, web.client.address(version)), "the address is in no ServiceCIDR yet"
    web.apply([*found, cidr])
    for origin in (web.client, web.node, web.outsider):
        assert web.drops(origin, UNUSED[version]), origin.name
    assert web.send_request(web.client, CLUSTER_IPS[version]) == seen(pod, web.client.address(version))


@PROTOCOLS
@VERSIONS
def test_first_service_by_name_owns_a_shared_external_ip(
    lab: Lab, web: WebService, version: int, protocol: str
) -> None:
    # Each step uses another client: a UDP flow may stay with its endpoint.
    sources = [f"2001:db8:51::2{n}" if version == 6 else f"198.51.100.2{n}" for n in range(4)]
    clients = lab.add_client("clients", *sources)
    one, two = web.pod(1), web.pod(2)
    node = web.node.address(version)
    external = [*EXTERNAL_IPS.values()]
    first = [web.service("a-web", "10.96.0.81", "fd00:10:96::81", externalIPs=external), *web.slices("a-web", [one])]
    second = [web.service("b-web", *CLUSTER_IPS.values(), externalIPs=external), *web.slices("b-web", [two])]
    steps = ((second, two), ([*second, *first], one), (second, two), ([*first, *second], one))
    for source, (state, pod) in zip(sources, steps, strict=True):
        web.apply(state)
        assert {web.send_request(clients, EXTERNAL_IPS[version], source=source) for _ in range(5)} == {seen(pod, node)}
        assert web.send_request(web.client, CLUSTER_IPS[version]) == seen(two, web.client.address(version))


@VERSIONS
def test_external_ip_cannot_take_over_a_cluster_ip(web: WebService, version: int) -> None:
    one, two = web.pod(1), web.pod(2)
    claimant = [
        web.service("a-thief", "10.96.0.81", "fd00:10:96::81", externalIPs=[*CLUSTER_IPS.values()]),
        *web.slices("a-thief", [one]),
    ]
    owner = [web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [two])]
    for state in ([*claimant, *owner], owner):
        web.apply(state)
        assert web.outcomes(web.client, CLUSTER_IPS[version]) == {seen(two, web.client.address(version))}
    web.apply([*claimant, web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [])])
    assert web.refuses(web.client, CLUSTER_IPS[version]), (
        "an external IP took over the ClusterIP of a Service without endpoints"
    )


@pytest.mark.parametrize("size", [2, 5, 7, 9, 13])
@VERSIONS
def test_connections_are_spread_evenly(web: WebService, version: int, size: int) -> None:
    pods = [web.pod(number) for number in range(1, size + 1)]
    web.apply_service(pods)
    for frontend in ((CLUSTER_IPS[version], 80), (web.node.address(version), NODE_PORT)):
        shares = count_by_pod([web.send_request(web.client, *frontend) for _ in range(60 * size)])
        assert set(shares) == {pod.name for pod in pods}
        # 60 for each pod, plus or minus five standard deviations.
        assert all(share in range(22, 100) for share in shares.values()), shares
