"""The ClusterRole allows exactly the requests that the daemon sends to the API server."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from tests.api.node import NodeDaemon
from tests.apiserver import ApiServer, SeenRequest
from tests.apiserver.objects import endpoint_slice, node, service
from tests.apiserver.resources import find_path
from tests.deploy.rendered import KUSTOMIZATIONS, one, render
from tests.lab.waiting import wait_until


class Permission(NamedTuple):
    """The attributes of a request that RBAC checks."""

    group: str
    resource: str
    verb: str


def permission(request: SeenRequest) -> Permission:
    """Return the permission that a request requires (RequestInfo of k8s.io/apiserver)."""
    match = find_path(request.path)
    assert match is not None, f"no API resource: {request}"
    resource, _, name = match
    verbs = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    verb = "watch" if request.is_watch else verbs[request.method]
    return Permission(resource.group, resource.plural, verb)


def allowed(name: str) -> set[Permission]:
    """Return the permissions in the ClusterRole of a kustomization, whose rules may use no other fields."""
    permissions = []
    for rule in one(render(name), "ClusterRole")["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        permissions += [
            Permission(group, resource, verb)
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        ]
    assert len(permissions) == len(set(permissions))
    return set(permissions)


def sent_requests(folder: Path, mode: str, watch_list: Literal["supported", "forbidden"]) -> list[SeenRequest]:
    """Run the daemon until it has programmed a Service and sent an event; return all of its requests."""
    with ApiServer(tokens=["secret"]) as server, closing(NodeDaemon(server, folder)) as daemon:
        server.set_watch_list(watch_list)
        server.create(node("node-1"))
        server.create(service("web", "10.96.7.1"))
        server.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
        daemon.start(f"--proxy-mode={mode}", "--metrics-bind-address=", "--healthz-bind-address=")
        program = ["nft", "list", "ruleset"] if mode == "nftables" else ["iptables-save"]
        wait_until(lambda: "10.244.1.1" in daemon.namespace.run(program).stdout, "the rules of the Service")
        server.requests.wait_for(lambda request: request.method == "POST")
        kinds, verb = (4 if mode == "nftables" else 3), ("watch" if watch_list == "supported" else "list")
        wait_until(lambda: count_resources(server, verb) == kinds, f"a {verb} of each kind")
        return server.requests.all()


def count_resources(server: ApiServer, verb: str) -> int:
    return len({each for each in map(permission, server.requests.all()) if each.verb == verb})


@pytest.fixture(scope="module")
def requests(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> list[SeenRequest]:
    """All requests in nftables mode, which watches the most kinds, to servers with and without streaming lists."""
    variants: tuple[Literal["supported", "forbidden"], ...] = ("supported", "forbidden")
    return [
        request
        for watch_list in variants
        for request in sent_requests(tmp_path_factory.mktemp(watch_list), "nftables", watch_list)
    ]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_role_allows_exactly_the_requests_of_the_daemon(name: str, requests: list[SeenRequest]) -> None:
    assert allowed(name) == {permission(request) for request in requests}


def test_iptables_mode_does_not_request_service_cidrs(requests: list[SeenRequest], tmp_path: Path) -> None:
    iptables = {permission(request) for request in sent_requests(tmp_path, "iptables", "supported")}
    nftables = {permission(request) for request in requests}
    assert iptables < nftables
    assert {item.resource for item in nftables} - {item.resource for item in iptables} == {"servicecidrs"}
