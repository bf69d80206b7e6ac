"""One address and port, and the client that sends requests to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from tests.e2e.cluster import Answer, Cluster, Failure, IpFamily, Node, Object, Outcome, Pod
from tests.e2e.manifests import PORT
from tests.e2e.waiting import until

ENOUGH = 60
"""Requests that reach all of three endpoints: the chance of missing one is 1 in 10^10."""

PER_POD = 12


class Target(msgspec.Struct, frozen=True):
    """Requests from one client to one address. Without a client, they come from outside the cluster."""

    cluster: Cluster
    client: Pod | None
    address: str
    port: int = PORT
    protocol: str = "TCP"

    def request(self, times: int = 1) -> list[Outcome]:
        """Send requests one by one; return the outcome of each."""
        if self.client is None:
            return self.cluster.request_from_outside(self.address, self.port, self.protocol, times=times)
        return self.cluster.request(self.client, self.address, self.port, self.protocol, times=times)

    def answers(self, times: int = 1) -> list[Answer]:
        """Send requests; return the answers. Fails unless every request is answered."""
        outcomes = self.request(times)
        assert len(outcomes) == times, f"{self}: {len(outcomes)} outcomes of {times} requests"
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        assert not failures, f"{self}: {len(failures)} of {times} requests failed: {failures[:5]}"
        return [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def answering_pods(self, times: int = ENOUGH) -> set[str]:
        """Send requests; return the names of the pods that answered. Fails unless every request is answered."""
        return {answer.pod for answer in self.answers(times)}

    def wait_for_pods(self, pods: Iterable[Pod]) -> None:
        """Return once exactly these pods answer, which means that a change has reached the proxies."""
        expected = {pod.name for pod in pods}
        until(lambda: self._answered_by(expected), f"{self}: answers from exactly {sorted(expected)}")

    def wait_for_failure(self, kind: str = "") -> None:
        """Return once a request fails; with `kind`, once it fails in this way."""
        until(lambda: self._fails(kind), f"{self}: a request fails {kind}")

    def wait_until_rejected(self, times: int = 3) -> None:
        """Return once a request is refused; all later requests must fail.

        Later ones may time out: Linux limits ICMP errors to one address to six at once, then one per second.
        """
        self.wait_for_failure("refused")
        self._fail(times)

    def wait_until_unanswered(self, times: int = 2) -> None:
        """Return once a request fails; all later requests must fail."""
        self.wait_for_failure()
        self._fail(times)

    def __str__(self) -> str:
        origin = f"pod {self.client.name} on {self.client.node}" if self.client else "outside"
        return f"from {origin} to {self.address} port {self.port} {self.protocol}"

    def _fail(self, times: int) -> None:
        outcomes = self.request(times)
        assert all(isinstance(outcome, Failure) for outcome in outcomes), f"{self}: {outcomes}"

    def _answered_by(self, expected: set[str]) -> bool:
        if not _names(self.request()) <= expected:
            return False
        return _names(self.request(PER_POD * len(expected))) == expected

    def _fails(self, kind: str) -> bool:
        (outcome,) = self.request()
        return isinstance(outcome, Failure) and kind in {"", outcome.kind}


def _names(outcomes: Sequence[Outcome]) -> set[str]:
    return {outcome.pod if isinstance(outcome, Answer) else "" for outcome in outcomes}


def cluster_ip(service: Object) -> str:
    """Return the first ClusterIP of a Service."""
    address: str = service["spec"]["clusterIP"]
    return address


def node_port(service: Object) -> int:
    """Return the NodePort of a Service's first port."""
    port: int = service["spec"]["ports"][0]["nodePort"]
    return port


def address_of(pod: Pod, cluster: Cluster, family: IpFamily) -> str:
    """Return a pod's address, which is the node's for a pod with hostNetwork."""
    return pod.addresses.get(family) or node_of(pod, cluster).addresses[family]


def node_of(pod: Pod, cluster: Cluster) -> Node:
    """Return the node of a pod."""
    return next(node for node in cluster.nodes if node.name == pod.node)
