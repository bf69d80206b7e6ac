"""Where real packets go in nftables mode: what the tests of both modes do not ask, or what is different there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.client import Answered, Refused
from tests.lab.continuous_requests import count_by_pod
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
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
def test_every_frontend_is_reached_from_everywhere(web: WebService, version: int, protocol: str) -> None:
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
def test_a_pod_reaches_itself_as_the_node_and_others_as_itself(
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
def test_a_pod_reaches_itself_though_no_slice_says_where_it_is(web: WebService, version: int, affinity: str) -> None:
    """Slices that are made by hand, or mirrored from an Endpoints object, have no nodeName."""
    pod = web.pod(1)
    made = web.slices("web", [pod])
    for each in made:
        for endpoint in each["endpoints"]:
            del endpoint["nodeName"]
    web.apply([web.service("web", *CLUSTER_IPS.values(), sessionAffinity=affinity), *made])
    assert web.send_request(pod, CLUSTER_IPS[version]) == seen(pod, web.node.address(version))


@VERSIONS
def test_a_pod_that_left_the_service_is_not_masqueraded_for_itself_any_more(
    lab: Lab, web: WebService, version: int
) -> None:
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
def test_external_policy_local_keeps_to_this_node_and_shows_the_source(
    web: WebService, version: int, protocol: str
) -> None:
    here, there = web.pod(1), web.pod(2, "node-2")
    web.apply_service([here, there], externalTrafficPolicy="Local")
    outsider, client, node = (each.address(version) for each in (web.outsider, web.client, web.node))
    for frontend in web.external(version):
        assert web.outcomes(web.outsider, *frontend) == {seen(here, outsider)}, frontend
        assert web.outcomes(web.client, *frontend) == {seen(here, client), seen(there, client)}, frontend
        assert web.outcomes(web.node, *frontend) == {seen(here, node), seen(there, node)}, frontend


@VERSIONS
def test_external_policy_local_without_endpoints_here_drops_all_but_pods_and_the_node(
    web: WebService, version: int
) -> None:
    there = web.pod(2, "node-2")
    web.apply_service([there], externalTrafficPolicy="Local")
    client, node = web.client.address(version), web.node.address(version)
    for frontend in web.external(version):
        assert web.drops(web.outsider, *frontend), frontend
        assert web.send_request(web.client, *frontend) == seen(there, client), frontend
        assert web.send_request(web.node, *frontend) == seen(there, node), frontend


@VERSIONS
def test_under_external_policy_local_the_node_is_masqueraded_even_if_it_has_the_address(
    lab: Lab, web: WebService, version: int
) -> None:
    own = f"{EXTERNAL_IPS[version]}/{128 if version == 6 else 32}"
    lab.node.namespace.run(["ip", "address", "add", own, "dev", "eth0", *_at_once(own)])
    there = web.pod(2, "node-2")
    web.apply_service([there], externalTrafficPolicy="Local")
    assert web.send_request(web.node, EXTERNAL_IPS[version]) == seen(there, web.node.address(version))


@PROTOCOLS
@VERSIONS
def test_internal_policy_local_keeps_to_this_node(web: WebService, version: int, protocol: str) -> None:
    here, there = web.pod(1), web.pod(2, "node-2")
    client, node = web.client.address(version), web.node.address(version)
    web.apply_service([here, there], internalTrafficPolicy="Local")
    assert web.outcomes(web.client, CLUSTER_IPS[version]) == {seen(here, client)}
    assert web.outcomes(web.node, CLUSTER_IPS[version]) == {seen(here, node)}
    assert web.outcomes(web.client, EXTERNAL_IPS[version]) == {seen(here, node), seen(there, node)}


@PROTOCOLS
@VERSIONS
def test_internal_policy_local_without_endpoints_here_drops(web: WebService, version: int, protocol: str) -> None:
    there = web.pod(2, "node-2")
    web.apply_service([there], internalTrafficPolicy="Local")
    assert web.drops(web.client, CLUSTER_IPS[version])
    assert web.drops(web.node, CLUSTER_IPS[version])
    assert web.send_request(web.outsider, EXTERNAL_IPS[version]) == seen(there, web.node.address(version))


@PROTOCOLS
@VERSIONS
def test_without_endpoints_every_frontend_refuses_at_once(web: WebService, version: int, protocol: str) -> None:
    web.apply_service([])
    for frontend in web.frontends(version):
        for origin in (web.client, web.outsider, web.node):
            assert web.refuses(origin, *frontend), (frontend, origin.name)


@VERSIONS
def test_only_chosen_sources_use_the_load_balancers_address(lab: Lab, web: WebService, version: int) -> None:
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


@pytest.mark.parametrize("holds", [False, True], ids=["address-elsewhere", "address-on-the-node"])
@VERSIONS
def test_a_node_in_the_ranges_uses_the_load_balancers_address(
    lab: Lab, web: WebService, version: int, holds: bool
) -> None:
    pod = web.pod(1)
    ranges = {4: "10.99.0.0/24", 6: "fd00:99::/64"}
    length = "128" if version == 6 else "32"
    if holds:
        own = f"{LOAD_BALANCER_IPS[version]}/{length}"
        lab.node.namespace.run(["ip", "address", "add", own, "dev", "eth0", *_at_once(own)])
    web.apply_service([pod], loadBalancerSourceRanges=[*ranges.values()])
    assert web.send_request(web.node, LOAD_BALANCER_IPS[version]) == seen(pod, web.node.address(version))
    source = LOAD_BALANCER_IPS[version] if holds else web.node.address(version)
    assert web.send_request(web.node, LOAD_BALANCER_IPS[version], source=source) == seen(pod, web.node.address(version))
    assert web.drops(web.outsider, LOAD_BALANCER_IPS[version])


@VERSIONS
def test_source_ranges_and_policy_local_together(web: WebService, version: int) -> None:
    here, there = web.pod(1), web.pod(2, "node-2")
    ranges = {4: "198.51.100.0/24", 6: "2001:db8:51::/64"}
    web.apply_service([here, there], loadBalancerSourceRanges=[*ranges.values()], externalTrafficPolicy="Local")
    assert web.outcomes(web.outsider, LOAD_BALANCER_IPS[version]) == {seen(here, web.outsider.address(version))}
    assert web.drops(web.client, LOAD_BALANCER_IPS[version])


@pytest.mark.parametrize(
    ("setting", "answering"),
    [
        ("", {"primary"}),
        ("primary", {"primary"}),
        ("10.99.0.7/32,fd00:99::7/128", {"second"}),
        ("0.0.0.0/0,::/0", {"primary", "second"}),
    ],
    ids=["default", "primary", "chosen", "all"],
)
@VERSIONS
def test_node_ports_answer_on_the_chosen_addresses_and_never_on_loopback(
    lab: Lab, web: WebService, version: int, setting: str, answering: set[str]
) -> None:
    pod = web.pod(1)
    node = lab.node.namespace
    for address, length in ((SECOND[4], 24), (SECOND[6], 64)):
        node.run(["ip", "address", "add", f"{address}/{length}", "dev", "eth0", *_at_once(address)])
    found = [web.service("web", *CLUSTER_IPS.values(), type="NodePort"), *web.slices("web", [pod])]
    web.apply(found, *([f"--nodeport-addresses={setting}"] if setting else []))
    addresses = {"primary": web.node.address(version), "second": SECOND[version]}
    for name, address in addresses.items():
        for origin in (web.outsider, web.node):
            outcome = web.send_request(origin, address, NODE_PORT)
            assert isinstance(outcome, Answered) == (name in answering), (name, origin.name)
    assert web.send_request(web.node, {4: "127.0.0.1", 6: "::1"}[version], NODE_PORT) == Refused()
    far = CLUSTER_IPS[version]
    assert web.refuses(web.client, far, NODE_PORT), "a NodePort is none of the ClusterIP's ports"


def _at_once(address: str) -> list[str]:
    return ["nodad"] if ":" in address else []


@PROTOCOLS
@VERSIONS
def test_other_ports_of_a_cluster_ip_are_refused(web: WebService, version: int, protocol: str) -> None:
    web.apply_service([web.pod(1)])
    for origin in (web.client, web.node, web.outsider):
        assert web.refuses(origin, CLUSTER_IPS[version], 81), origin.name


@PROTOCOLS
@VERSIONS
def test_addresses_that_no_service_has_are_dropped(
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
    assert answer == seen(elsewhere, web.client.address(version)), "nobody said that it is an address for Services"
    web.apply([*found, cidr])
    for origin in (web.client, web.node, web.outsider):
        assert web.drops(origin, UNUSED[version]), origin.name
    assert web.send_request(web.client, CLUSTER_IPS[version]) == seen(pod, web.client.address(version))


@PROTOCOLS
@VERSIONS
def test_of_two_services_that_claim_an_external_ip_the_first_by_name_has_it(
    lab: Lab, web: WebService, version: int, protocol: str
) -> None:
    # A client of its own for each step: those of UDP may stay with whom they were sent to.
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
def test_nobody_takes_over_a_cluster_ip(web: WebService, version: int) -> None:
    one, two = web.pod(1), web.pod(2)
    thief = [
        web.service("a-thief", "10.96.0.81", "fd00:10:96::81", externalIPs=[*CLUSTER_IPS.values()]),
        *web.slices("a-thief", [one]),
    ]
    victim = [web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [two])]
    for state in ([*thief, *victim], victim):
        web.apply(state)
        assert web.outcomes(web.client, CLUSTER_IPS[version]) == {seen(two, web.client.address(version))}
    web.apply([*thief, web.service("web", *CLUSTER_IPS.values()), *web.slices("web", [])])
    assert web.refuses(web.client, CLUSTER_IPS[version]), "not even while its Service has no endpoints"


@pytest.mark.parametrize("size", [2, 5, 7, 9, 13])
@VERSIONS
def test_every_endpoint_gets_its_share(web: WebService, version: int, size: int) -> None:
    pods = [web.pod(number) for number in range(1, size + 1)]
    web.apply_service(pods)
    for frontend in ((CLUSTER_IPS[version], 80), (web.node.address(version), NODE_PORT)):
        shares = count_by_pod([web.send_request(web.client, *frontend) for _ in range(60 * size)])
        assert set(shares) == {pod.name for pod in pods}
        # 60 for each, give or take five standard deviations.
        assert all(share in range(22, 100) for share in shares.values()), shares
