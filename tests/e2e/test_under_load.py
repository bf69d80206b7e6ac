"""Changes that must not fail a single connection: of pods, kproxy restarts, mode switches, swaps with kube-proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from tests.e2e.cluster import HTTP_PORT, Answer, Cluster, IpFamily, Load, Mode, Pod
from tests.e2e.manifests import PORT, labels, service
from tests.e2e.needs import needs
from tests.e2e.target import Target, cluster_ip
from tests.e2e.waiting import until

MORE_ANSWERS = 100
"""Requests before and after a change: a second or two of load."""

GRACE = 10
"""Seconds that deleted pods keep serving. Many times what the nodes need to react."""


def web(cluster: Cluster, generation: int, count: int = 3) -> list[Pod]:
    """Create pods of the Service `web` on all nodes in turn."""
    nodes = [cluster.nodes[number % len(cluster.nodes)].name for number in range(count)]
    return [cluster.pod(f"web-{generation}-{i}", node, labels("web")) for i, node in enumerate(nodes)]


def web_target(cluster: Cluster, family: IpFamily, pods: list[Pod]) -> Target:
    """Create the Service `web` and a client; return its ClusterIP as target once all pods answer."""
    address = cluster_ip(cluster.apply(service("web", family)))
    target = Target(cluster, cluster.pod("client", cluster.nodes[-1].name), address)
    target.wait_for_pods(pods)
    return target


@contextmanager
def no_failed_requests(target: Target) -> Iterator[Load]:
    """Send load during the body, and some before and after it. Fails if a single request failed."""
    assert target.client is not None
    with target.cluster.load(target.client, target.address, target.port) as load:
        wait_for_more_answers(load)
        yield load
        wait_for_more_answers(load)
    assert list(load.failures()) == []


def wait_for_more_answers(load: Load) -> None:
    """Return once `MORE_ANSWERS` more requests were answered, or a request failed."""
    goal = load.answers + MORE_ANSWERS
    until(lambda: load.answers >= goal or load.failures(), f"{goal} answers")


def test_rolling_update(cluster: Cluster, family: IpFamily) -> None:
    """Replace one pod after another, as a Deployment does. The load lasts until the last old pod has exited."""
    pods = web(cluster, 1)
    target = web_target(cluster, family, pods)
    with no_failed_requests(target):
        new = []
        for number, old in enumerate(pods):
            new.append(cluster.pod(f"web-2-{number}", old.node, labels("web")))
            cluster.delete_pod(old, GRACE)
        for old in pods:
            Target(cluster, target.client, old.addresses[family], HTTP_PORT).wait_for_failure()
    target.wait_for_pods(new)


def test_scaling_to_zero(cluster: Cluster, family: IpFamily) -> None:
    """While all pods are terminating, they still serve. Afterwards, requests are rejected."""
    pods = web(cluster, 1)
    target = web_target(cluster, family, pods)
    with no_failed_requests(target):
        for pod in pods:
            cluster.delete_pod(pod, 2 * GRACE)
    for pod in pods:
        Target(cluster, target.client, pod.addresses[family], HTTP_PORT).wait_for_failure()
    target.wait_until_rejected()


@pytest.mark.parametrize("ending", ["restart", "kill"])
def test_kproxy_restarts_on_every_node(cluster: Cluster, family: IpFamily, ending: Literal["restart", "kill"]) -> None:
    pods = web(cluster, 1)
    target = web_target(cluster, family, pods)
    stop = cluster.proxies.restart if ending == "restart" else cluster.proxies.kill
    with no_failed_requests(target) as load:
        for node in cluster.nodes:
            stop(node.name)
            wait_for_more_answers(load)
    check_that_changes_are_applied(target, pods)


def test_mode_switch_and_back(cluster: Cluster, family: IpFamily) -> None:
    pods = web(cluster, 1)
    target = web_target(cluster, family, pods)
    session = udp_session(cluster, family, target)
    before = cluster.proxies.mode()
    other: Mode = "nftables" if before == "iptables" else "iptables"
    with no_failed_requests(target) as load:
        with cluster.proxies.in_mode(other):
            assert cluster.proxies.mode() == other
            wait_for_more_answers(load)
            until(lambda: is_answered(session), "the UDP socket gets answers in the other mode")
            check_that_changes_are_applied(target, pods, "in-the-other-mode")
        assert cluster.proxies.mode() == before
    until(lambda: is_answered(session), "the UDP socket gets answers in the original mode")
    check_that_changes_are_applied(target, pods)


@needs("kube-proxy")
def test_swap_with_kube_proxy_and_back(cluster: Cluster, family: IpFamily) -> None:
    pods = web(cluster, 1)
    target = web_target(cluster, family, pods)
    with no_failed_requests(target) as load, cluster.proxies.replaced_by_kube_proxy():
        wait_for_more_answers(load)
        check_that_changes_are_applied(target, pods, "with-kube-proxy")
    check_that_changes_are_applied(target, pods)


def test_nftables_mode_rejects_ports_that_the_service_does_not_have(cluster: Cluster, family: IpFamily) -> None:
    pods = web(cluster, 1, count=1)
    target = web_target(cluster, family, pods)
    with cluster.proxies.in_mode("nftables"):
        target.wait_for_pods(pods)
        Target(cluster, target.client, target.address, PORT + 1).wait_until_rejected()


def check_that_changes_are_applied(target: Target, pods: list[Pod], name: str = "one-more") -> None:
    """Add an endpoint and delete it again; both changes must take effect."""
    added = target.cluster.pod(name, target.cluster.nodes[0].name, labels("web"))
    target.wait_for_pods([*pods, added])
    target.cluster.delete_pod(added, grace=GRACE)
    target.wait_for_pods(pods)


def udp_session(cluster: Cluster, family: IpFamily, target: Target) -> Target:
    """Create a UDP Service with the same pods; return its ClusterIP as target."""
    address = cluster_ip(cluster.apply(service("web-udp", family, "UDP", selector=labels("web"))))
    session = Target(cluster, target.client, address, PORT, "UDP")
    until(lambda: is_answered(session), "the UDP socket gets answers")
    return session


def is_answered(target: Target) -> bool:
    """Return whether a request is answered. UDP requests use one socket."""
    if target.protocol == "UDP" and target.client is not None:
        (outcome,) = target.cluster.request_from_one_socket(target.client, target.address, target.port, times=1)
    else:
        (outcome,) = target.request()
    return isinstance(outcome, Answer)
