"""sessionAffinity: ClientIP."""

from __future__ import annotations

from tests.e2e.cluster import Answer, Cluster, IpFamily, Object, Pod
from tests.e2e.manifests import labels, service
from tests.e2e.waiting import until
from tests.e2e.way import Way, cluster_ip

SHORT, LONG = 3, 3600
"""Seconds of a session."""


def sticky(family: IpFamily, seconds: int) -> Object:
    """A Service `web` with sessions of so many seconds."""
    config = {"clientIP": {"timeoutSeconds": seconds}}
    return service("web", family, sessionAffinity="ClientIP", sessionAffinityConfig=config)


def three_pods(cluster: Cluster) -> dict[str, Pod]:
    """Pods by name, on the first and the last node."""
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    pods = [*cluster.pods("web", first, labels("web"), 2), cluster.pod("far", last, labels("web"))]
    return {pod.name: pod for pod in pods}


def settled_way(cluster: Cluster, family: IpFamily, seconds: int, pods: dict[str, Pod]) -> Way:
    """A way to a Service with sessions, of which it is known that all its pods are behind it.

    Without affinity first: a client with a session would never see more than one of them.
    """
    address = cluster_ip(cluster.apply(service("web", family)))
    way = Way(cluster, cluster.pod("client", cluster.nodes[0].name), address)
    way.settle_on(pods.values())
    cluster.apply(sticky(family, seconds))
    until(lambda: len({str(outcome) for outcome in way.ask(20)}) == 1, "one pod answers all requests")
    return way


def test_a_client_stays_with_its_pod_until_that_is_gone(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    way = settled_way(cluster, family, LONG, pods)
    (chosen,) = way.pods()
    assert way.pods() == {chosen}
    cluster.delete_pod(pods[chosen], grace=1)
    others = pods.keys() - {chosen}
    until(lambda: {getattr(outcome, "pod", "") for outcome in way.ask(10)} <= others, "another pod answers")
    (moved,) = way.pods()
    assert moved in others


def test_a_session_ends_some_time_after_the_clients_last_request(cluster: Cluster, family: IpFamily) -> None:
    way = settled_way(cluster, family, SHORT, three_pods(cluster))
    (chosen,) = way.pods(20)

    def another_answers() -> bool:
        (outcome,) = way.ask()
        return isinstance(outcome, Answer) and outcome.pod != chosen

    # Each look is a request too, and has to come after the session of the one before.
    until(another_answers, "a session ends", between=2 * SHORT)
