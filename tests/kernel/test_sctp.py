"""SCTP associations through every kind of frontend, in both modes. Skipped if the kernel has no SCTP sockets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.client import Answered, Refused, complete_request, open_connection
from tests.lab.modes import BOTH_MODES
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.web_service import CLUSTER_IPS, NODE_PORT, WebService

PROTOCOL = "SCTP"
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> WebService:
    if absent := missing_protocol(PROTOCOL):
        pytest.skip(absent)
    folder = tmp_path / "objects"
    folder.mkdir()
    return WebService(lab, servers, folder, PROTOCOL, mode)


def seen(pod: Host, source: str) -> Answered:
    return Answered(pod.name, source)


@BOTH_MODES
@VERSIONS
def test_endpoints_share_the_associations_of_every_frontend(web: WebService, version: int, mode: str) -> None:
    pods = [web.pod(1), web.pod(2)]
    web.apply_service(pods)
    client, node = web.client.address(version), web.node.address(version)
    assert web.outcomes(web.client, CLUSTER_IPS[version]) == {seen(pod, client) for pod in pods}
    for frontend in web.external(version):
        assert web.outcomes(web.outsider, *frontend) == {seen(pod, node) for pod in pods}, frontend


@BOTH_MODES
@VERSIONS
def test_associations_from_outside_and_to_the_own_pod_are_masqueraded(web: WebService, version: int, mode: str) -> None:
    pod = web.pod(1)
    web.apply_service([pod])
    client, node = web.client.address(version), web.node.address(version)
    assert web.send_request(web.client, CLUSTER_IPS[version]) == seen(pod, client)
    for origin in (web.outsider, web.node, pod):
        assert web.send_request(origin, CLUSTER_IPS[version]) == seen(pod, node), origin.name
    assert web.send_request(web.client, node, NODE_PORT) == seen(pod, node)


@BOTH_MODES
@VERSIONS
def test_policy_local_keeps_the_source(web: WebService, version: int, mode: str) -> None:
    local = web.pod(1)
    web.apply_service([local, web.pod(2, "node-2")], externalTrafficPolicy="Local")
    outsider = web.outsider.address(version)
    for frontend in web.external(version):
        assert web.outcomes(web.outsider, *frontend) == {seen(local, outsider)}, frontend


@BOTH_MODES
@VERSIONS
def test_every_frontend_rejects_without_endpoints(web: WebService, version: int, mode: str) -> None:
    web.apply_service([])
    for frontend in web.frontends(version):
        assert web.send_request(web.client, *frontend) == Refused(), frontend
        assert web.send_request(web.outsider, *frontend) == Refused(), frontend


@BOTH_MODES
@VERSIONS
def test_new_associations_follow_a_change_of_endpoints_and_open_ones_stay(
    web: WebService, version: int, mode: str
) -> None:
    old, new = web.pod(1), web.pod(2)
    client, node = web.client.address(version), web.node.address(version)
    web.apply_service([old])
    with (
        open_connection(web.client, CLUSTER_IPS[version], 80, PROTOCOL) as inside,
        open_connection(web.outsider, node, NODE_PORT, PROTOCOL) as outside,
    ):
        web.apply_service([new])
        assert web.send_request(web.client, CLUSTER_IPS[version]) == seen(new, client)
        assert web.send_request(web.outsider, node, NODE_PORT) == seen(new, node)
        assert complete_request(inside) == seen(old, client)
        assert complete_request(outside) == seen(old, node)
    web.apply_service([])
    assert web.send_request(web.client, CLUSTER_IPS[version]) == Refused()
    assert web.send_request(web.outsider, node, NODE_PORT) == Refused()
    web.apply_service([old, new])
    assert web.outcomes(web.client, CLUSTER_IPS[version]) == {seen(old, client), seen(new, client)}


@BOTH_MODES
@VERSIONS
def test_session_affinity_keeps_a_client_on_its_endpoint(web: WebService, version: int, mode: str) -> None:
    web.apply_service([web.pod(1), web.pod(2)], sessionAffinity="ClientIP")
    assert len(web.outcomes(web.client, CLUSTER_IPS[version])) == 1
    assert len(web.outcomes(web.outsider, web.node.address(version), NODE_PORT)) == 1
