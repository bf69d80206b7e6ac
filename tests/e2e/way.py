"""A way to reach something: from a pod or from outside, to one address and port."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from tests.e2e.cluster import Answer, Cluster, Failure, IpFamily, Node, Object, Outcome, Pod
from tests.e2e.manifests import PORT
from tests.e2e.waiting import until

ENOUGH = 60
"""Requests after which three endpoints have all answered: one is missed once in ten thousand million times."""

PER_POD = 12


class Way(msgspec.Struct, frozen=True):
    """Requests of one client to one address. Without a client, they come from outside the cluster."""

    cluster: Cluster
    client: Pod | None
    address: str
    port: int = PORT
    protocol: str = "TCP"

    def ask(self, times: int = 1) -> list[Outcome]:
        """Send requests one after the other, and return what came of each."""
        if self.client is None:
            return self.cluster.ask_from_outside(self.address, self.port, self.protocol, times=times)
        return self.cluster.ask(self.client, self.address, self.port, self.protocol, times=times)

    def answers(self, times: int = 1) -> list[Answer]:
        """Send requests; fail unless every single one is answered."""
        outcomes = self.ask(times)
        assert len(outcomes) == times, f"{self}: {len(outcomes)} outcomes of {times} requests"
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        assert not failures, f"{self}: {len(failures)} of {times} requests failed: {failures[:5]}"
        return [outcome for outcome in outcomes if isinstance(outcome, Answer)]

    def pods(self, times: int = ENOUGH) -> set[str]:
        """Send requests; fail unless all are answered; return the names of the pods that did."""
        return {answer.pod for answer in self.answers(times)}

    def settle_on(self, pods: Iterable[Pod]) -> None:
        """Return once all of these pods and no other answer, which is how a change shows that it has arrived."""
        wanted = {pod.name for pod in pods}
        until(lambda: self._answered_by(wanted), f"{self}: answers of {sorted(wanted)} alone")

    def settle_on_failure(self, kind: str = "") -> None:
        """Return once a request fails, in the given way if one is given."""
        until(lambda: self._fails(kind), f"{self}: a request fails {kind}")

    def refused(self, times: int = 3) -> None:
        """Return once a request is refused; from then on each has to fail.

        Not each by a refusal: a kernel sends one address few ICMP errors, six at once and then one a second.
        """
        self.settle_on_failure("refused")
        self._fail(times)

    def unanswered(self, times: int = 2) -> None:
        """Return once a request fails in whatever way; from then on each has to."""
        self.settle_on_failure()
        self._fail(times)

    def __str__(self) -> str:
        origin = f"pod {self.client.name} on {self.client.node}" if self.client else "outside"
        return f"from {origin} to {self.address} port {self.port} {self.protocol}"

    def _fail(self, times: int) -> None:
        outcomes = self.ask(times)
        assert all(isinstance(outcome, Failure) for outcome in outcomes), f"{self}: {outcomes}"

    def _answered_by(self, wanted: set[str]) -> bool:
        if not _names(self.ask()) <= wanted:
            return False
        return _names(self.ask(PER_POD * len(wanted))) == wanted

    def _fails(self, kind: str) -> bool:
        (outcome,) = self.ask()
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
    """Return a pod's address; one in its node's network has the node's."""
    return pod.addresses.get(family) or node_of(pod, cluster).addresses[family]


def node_of(pod: Pod, cluster: Cluster) -> Node:
    """Return the node that a pod is on."""
    return next(node for node in cluster.nodes if node.name == pod.node)
