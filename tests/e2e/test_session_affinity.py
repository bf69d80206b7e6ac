"""sessionAffinity: ClientIP."""

from __future__ import annotations

from tests.e2e.cluster import Answer, Cluster, IpFamily, Object, Pod
from tests.e2e.manifests import labels, service
from tests.e2e.target import Target, cluster_ip
from tests.e2e.waiting import until

SHORT, LONG = 3, 3600
"""Session affinity timeouts in seconds."""


def sticky(family: IpFamily, seconds: int) -> Object:
    """A Service `web` with session affinity and this timeout."""
    config = {"clientIP": {"timeoutSeconds": seconds}}
    return service("web", family, sessionAffinity="ClientIP", sessionAffinityConfig=config)


def three_pods(cluster: Cluster) -> dict[str, Pod]:
    """Three pods by name, on the first and the last node."""
    first, last = cluster.nodes[0].name, cluster.nodes[-1].name
    pods = [*cluster.pods("web", first, labels("web"), 2), cluster.pod("far", last, labels("web"))]
    return {pod.name: pod for pod in pods}


def target_with_affinity(cluster: Cluster, family: IpFamily, seconds: int, pods: dict[str, Pod]) -> Target:
    """Return a target with session affinity, after checking that all its pods are endpoints.

    The check is made without affinity: with it, the client would reach only one pod.
    """
    address = cluster_ip(cluster.apply(service("web", family)))
    target = Target(cluster, cluster.pod("client", cluster.nodes[0].name), address)
    target.wait_for_pods(pods.values())
    cluster.apply(sticky(family, seconds))
    until(lambda: len({str(outcome) for outcome in target.request(20)}) == 1, "one pod answers all requests")
    return target


def test_client_stays_with_its_pod_until_the_pod_is_deleted(cluster: Cluster, family: IpFamily) -> None:
    pods = three_pods(cluster)
    target = target_with_affinity(cluster, family, LONG, pods)
    (chosen,) = target.answering_pods()
    assert target.answering_pods() == {chosen}
    cluster.delete_pod(pods[chosen], grace=1)
    others = pods.keys() - {chosen}
    until(lambda: {getattr(outcome, "pod", "") for outcome in target.request(10)} <= others, "another pod answers")
    (moved,) = target.answering_pods()
    assert moved in others


def test_affinity_expires_after_the_timeout(cluster: Cluster, family: IpFamily) -> None:
    target = target_with_affinity(cluster, family, SHORT, three_pods(cluster))
    (chosen,) = target.answering_pods(20)

    def answered_by_another() -> bool:
        (outcome,) = target.request()
        return isinstance(outcome, Answer) and outcome.pod != chosen

    # Each poll is a request too, which renews the session: wait longer than its timeout in between.
    until(answered_by_another, "the session expires", interval=2 * SHORT)
