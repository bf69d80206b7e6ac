"""Changes that must not cost a single connection: of the pods, of kproxy, of its mode, of kube-proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from tests.e2e.cluster import HTTP_PORT, Answer, Cluster, IpFamily, Load, Mode, Pod
from tests.e2e.manifests import PORT, labels, service
from tests.e2e.needs import needs
from tests.e2e.waiting import until
from tests.e2e.way import Way, cluster_ip

A_FEW = 100
"""Requests that are answered before and after a change: a second or two of load."""

GRACE = 10
"""Seconds that pods which leave go on serving, many times what it takes until every node knows."""


def web(cluster: Cluster, generation: int, count: int = 3) -> list[Pod]:
    """Pods of the Service `web`, over all nodes."""
    nodes = [cluster.nodes[number % len(cluster.nodes)].name for number in range(count)]
    return [cluster.pod(f"web-{generation}-{i}", node, labels("web")) for i, node in enumerate(nodes)]


def settled(cluster: Cluster, family: IpFamily, pods: list[Pod]) -> Way:
    """The way from a client to the ClusterIP of the Service `web`, once all its pods answer."""
    address = cluster_ip(cluster.apply(service("web", family)))
    way = Way(cluster, cluster.pod("client", cluster.nodes[-1].name), address)
    way.settle_on(pods)
    return way


@contextmanager
def unharmed(way: Way) -> Iterator[Load]:
    """Load on a way during a change. Fails if of all requests before, during and after it a single one failed."""
    assert way.client is not None
    with way.cluster.load(way.client, way.address, way.port) as load:
        a_few_more(load)
        yield load
        a_few_more(load)
    assert list(load.failures()) == []


def a_few_more(load: Load) -> None:
    """Return once some more requests have been answered, or some have failed."""
    goal = load.answers + A_FEW
    until(lambda: load.answers >= goal or load.failures(), f"{goal} answers")


def test_a_rolling_update(cluster: Cluster, family: IpFamily) -> None:
    """One pod after the other is replaced, as a Deployment does it; the load goes on until the last one has ended."""
    pods = web(cluster, 1)
    way = settled(cluster, family, pods)
    with unharmed(way):
        new = []
        for number, old in enumerate(pods):
            new.append(cluster.pod(f"web-2-{number}", old.node, labels("web")))
            cluster.delete_pod(old, GRACE)
        for old in pods:
            Way(cluster, way.client, old.addresses[family], HTTP_PORT).settle_on_failure()
    way.settle_on(new)


def test_scaling_to_zero(cluster: Cluster, family: IpFamily) -> None:
    """While all pods leave, they are the only ones to serve, and do; afterwards there is nobody."""
    pods = web(cluster, 1)
    way = settled(cluster, family, pods)
    with unharmed(way):
        for pod in pods:
            cluster.delete_pod(pod, 2 * GRACE)
    for pod in pods:
        Way(cluster, way.client, pod.addresses[family], HTTP_PORT).settle_on_failure()
    way.refused()


@pytest.mark.parametrize("ending", ["restart", "kill"])
def test_kproxy_ends_and_comes_back_on_every_node(
    cluster: Cluster, family: IpFamily, ending: Literal["restart", "kill"]
) -> None:
    pods = web(cluster, 1)
    way = settled(cluster, family, pods)
    end = cluster.proxies.restart if ending == "restart" else cluster.proxies.kill
    with unharmed(way) as load:
        for node in cluster.nodes:
            end(node.name)
            a_few_more(load)
    it_still_follows(way, pods)


def test_the_mode_is_switched_and_back(cluster: Cluster, family: IpFamily) -> None:
    pods = web(cluster, 1)
    way = settled(cluster, family, pods)
    session = udp_session(cluster, family, way)
    before = cluster.proxies.mode()
    other: Mode = "nftables" if before == "iptables" else "iptables"
    with unharmed(way) as load:
        with cluster.proxies.in_mode(other):
            assert cluster.proxies.mode() == other
            a_few_more(load)
            until(lambda: answers(session), "the UDP session is answered in the other mode")
            it_still_follows(way, pods, "in-the-other-mode")
        assert cluster.proxies.mode() == before
    until(lambda: answers(session), "the UDP session is answered in the mode of before")
    it_still_follows(way, pods)


@needs("kube-proxy")
def test_kube_proxy_takes_over_and_kproxy_again(cluster: Cluster, family: IpFamily) -> None:
    pods = web(cluster, 1)
    way = settled(cluster, family, pods)
    with unharmed(way) as load, cluster.proxies.replaced_by_kube_proxy():
        a_few_more(load)
        it_still_follows(way, pods, "with-kube-proxy")
    it_still_follows(way, pods)


def test_a_port_that_a_service_does_not_have_is_refused_in_mode_nftables(cluster: Cluster, family: IpFamily) -> None:
    pods = web(cluster, 1, count=1)
    way = settled(cluster, family, pods)
    with cluster.proxies.in_mode("nftables"):
        way.settle_on(pods)
        Way(cluster, way.client, way.address, PORT + 1).refused()


def it_still_follows(way: Way, pods: list[Pod], name: str = "one-more") -> None:
    """Return once a pod more has been answering, and is gone again: the proxies hear of changes and write them."""
    more = way.cluster.pod(name, way.cluster.nodes[0].name, labels("web"))
    way.settle_on([*pods, more])
    way.cluster.delete_pod(more, grace=GRACE)
    way.settle_on(pods)


def udp_session(cluster: Cluster, family: IpFamily, way: Way) -> Way:
    """A way by datagrams to the same pods."""
    address = cluster_ip(cluster.apply(service("web-udp", family, "UDP", selector=labels("web"))))
    session = Way(cluster, way.client, address, PORT, "UDP")
    until(lambda: answers(session), "the UDP session is answered")
    return session


def answers(way: Way) -> bool:
    """Return whether a request is answered; a UDP client keeps to one socket."""
    if way.protocol == "UDP" and way.client is not None:
        (outcome,) = way.cluster.ask_from_one_socket(way.client, way.address, way.port, times=1)
    else:
        (outcome,) = way.ask()
    return isinstance(outcome, Answer)
