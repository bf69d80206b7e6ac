"""The ClusterRole allows what the daemon asks the API server for, and nothing that it does not ask for."""

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
    """What RBAC goes by."""

    group: str
    resource: str
    verb: str


def permission(request: SeenRequest) -> Permission:
    """Return what a request takes, as kube-apiserver works it out (RequestInfo of k8s.io/apiserver)."""
    found = find_path(request.path)
    assert found is not None, f"no resource of the API: {request}"
    resource, _, name = found
    verbs = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    verb = "watch" if request.is_watch else verbs[request.method]
    return Permission(resource.group, resource.plural, verb)


def allowed(name: str) -> set[Permission]:
    """Return what the ClusterRole of a kustomization allows; it must name nothing by a pattern or by its name."""
    found = []
    for rule in one(render(name), "ClusterRole")["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        found += [
            Permission(group, resource, verb)
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        ]
    assert len(found) == len(set(found))
    return set(found)


def asked(folder: Path, mode: str, watch_list: Literal["supported", "forbidden"]) -> list[SeenRequest]:
    """Run the daemon until it has programmed a Service and written an event, and return all of its requests."""
    with ApiServer(tokens=["secret"]) as server, closing(NodeDaemon(server, folder)) as daemon:
        server.set_watch_list(watch_list)
        server.create(node("node-1"))
        server.create(service("web", "10.96.7.1"))
        server.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
        daemon.start(f"--proxy-mode={mode}", "--metrics-bind-address=", "--healthz-bind-address=")
        program = ["nft", "list", "ruleset"] if mode == "nftables" else ["iptables-save"]
        wait_until(lambda: "10.244.1.1" in daemon.namespace.run(program).stdout, "the Service's rules")
        server.requests.wait_for(lambda request: request.method == "POST")
        kinds, verb = (4 if mode == "nftables" else 3), ("watch" if watch_list == "supported" else "list")
        wait_until(lambda: done(server, verb) == kinds, f"a {verb} of each kind")
        return server.requests.all()


def done(server: ApiServer, verb: str) -> int:
    return len({found for found in map(permission, server.requests.all()) if found.verb == verb})


@pytest.fixture(scope="module")
def requests(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> list[SeenRequest]:
    """Everything the daemon asks for: in the mode that follows most kinds, of servers new and old."""
    ways: tuple[Literal["supported", "forbidden"], ...] = ("supported", "forbidden")
    return [request for way in ways for request in asked(tmp_path_factory.mktemp(way), "nftables", way)]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_role_allows_exactly_what_is_asked_for(name: str, requests: list[SeenRequest]) -> None:
    assert allowed(name) == {permission(request) for request in requests}


def test_mode_iptables_asks_for_less(requests: list[SeenRequest], tmp_path: Path) -> None:
    less = {permission(request) for request in asked(tmp_path, "iptables", "supported")}
    everything = {permission(request) for request in requests}
    assert less < everything
    assert {item.resource for item in everything} - {item.resource for item in less} == {"servicecidrs"}
