"""The objects of the soak test, and random changes to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kproxy.model.types import Family
from tests.apiserver import ApiServer
from tests.drift_times import victims
from tests.lab import objects
from tests.lab.topology import NODE, NODE_ADDRESSES
from tests.soak.traffic import Target

NODES = (NODE, "node-2", "node-3")
PORT = 8080
PODS = 12
"""Pods of each Service. All of them always answer; only some of them are endpoints."""

NODE_PORT = 30400
TRANSIENT = 10
"""Number of Services that come and go. Nobody connects to them."""

CLASSES = ("steady", "resized", "rolling", "policies", "affinity", "udp", "damaged")
"""The classes of Services that clients connect to. Each Service of a class keeps at least one ready endpoint."""

PER_CLASS = 2
DAMAGED = tuple(range(victims.PLAIN, victims.PLAIN + 4))
"""The numbers of the Services whose rules another program damages. Their objects never change."""

_DAMAGED = CLASSES.index("damaged")


def pod_addresses(service: int, number: int) -> tuple[str, str]:
    """Return the addresses of a pod. Pods are spread over the nodes in turn."""
    subnet, host = number % len(NODES) + 1, 20 + service * 8 + number // len(NODES)
    return f"10.244.{subnet}.{host}", f"fd00:10:244:{subnet}::{host:x}"


def addresses_on(node: str) -> list[str]:
    """Return the addresses of all pods of a node."""
    subnet = NODES.index(node) + 1
    found = [
        address
        for service in range(len(CLASSES) * PER_CLASS)
        for number in range(PODS)
        if number % len(NODES) == subnet - 1
        for address in pod_addresses(service, number)
    ]
    return found + ([each for both in victims.PODS.values() for each in both] if node == NODE else [])


class SoakCluster:
    """The objects in an API server."""

    def __init__(self, api: ApiServer, chance: random.Random) -> None:
        self._api, self._random = api, chance
        self._members: dict[int, list[int]] = {}
        self._extra: dict[int, dict[str, Any]] = {}
        self._marks = 100
        self._transient: dict[int, list[objects.Object]] = {}
        api.create(objects.node())
        for number in (victims.NODE, victims.EMPTY, *DAMAGED):
            for each in victims.service_objects(number):
                api.create(each)
        for service in self._services():
            self._members[service] = list(range(3))
            self._extra[service] = {"type": "NodePort"}
            if self._label(service) == "affinity":
                self._extra[service]["sessionAffinity"] = "ClientIP"
            self._put(service)

    @staticmethod
    def _services() -> Iterator[int]:
        """Yield the numbers of the Services that clients connect to, except for the damaged ones."""
        return iter(range(_DAMAGED * PER_CLASS))

    @staticmethod
    def _label(service: int) -> str:
        return CLASSES[service // PER_CLASS]

    def targets(self, *, outside: bool) -> list[Target]:
        """Return the NodePorts for a client outside the cluster, or the ClusterIPs for one inside."""
        found = []
        for service in self._services():
            label = self._label(service)
            protocol = "UDP" if label == "udp" else "TCP"
            for version, address in enumerate(NODE_ADDRESSES if outside else _cluster_ips(service)):
                pods = tuple(pod_addresses(service, number)[version] for number in range(PODS))
                port = NODE_PORT + service if outside else 80
                long_lived = protocol == "TCP" and label != "rolling" and not outside
                found.append(Target(label, _name(service), address, port, protocol, pods, long_lived))
        for number in () if outside else DAMAGED:
            for family in Family:
                address = victims.cluster_ip(number, family)
                found.append(
                    Target("damaged", victims.name(number), address, 80, "TCP", victims.PODS[family], number % 2 == 0)
                )
        return found

    def change(self) -> str:
        """Make one random change and return what it was."""
        changes: Sequence[tuple[int, Callable[[], str]]] = (
            (4, self._resize),
            (3, self._roll),
            (2, self._change_policies),
            (3, self._put_transient),
            (2, self._delete_transient),
        )
        (chosen,) = self._random.choices([change for _, change in changes], [weight for weight, _ in changes])
        return chosen()

    def delete_all_transient(self) -> None:
        """Delete the Services that come and go."""
        for number in sorted(self._transient):
            self._remove(number)

    def put_mark(self) -> dict[Family, tuple[str, str]]:
        """Give a Service a new endpoint and a new port, and return both.

        They appear in the rules once these are up to date.
        """
        self._marks += 1
        addresses = f"10.244.250.{self._marks}", f"fd00:10:244:250::{self._marks:x}"
        self._api.apply(objects.service("mark", "10.96.9.9", "fd00:10:96:9::9", port=8000 + self._marks))
        for family, address in zip(Family, addresses, strict=True):
            self._api.apply(objects.endpoint_slice("mark", [objects.endpoint(address)], family=family.value))
        return {family: (address, f"{8000 + self._marks}") for family, address in zip(Family, addresses, strict=True)}

    def _of_class(self, label: str) -> int:
        return CLASSES.index(label) * PER_CLASS + self._random.randrange(PER_CLASS)

    def _resize(self) -> str:
        service = self._of_class("resized")
        kept = [service % PER_CLASS]
        more = self._random.sample([each for each in range(PODS) if each not in kept], self._random.randrange(PODS))
        self._members[service] = kept + more
        self._put(service)
        return f"{_name(service)} has {len(more) + 1} endpoints"

    def _roll(self) -> str:
        """Add a new endpoint and make an old one terminate, as a Deployment does."""
        service = self._of_class("rolling")
        members = self._members[service]
        new = (members[-1] + 1) % PODS
        self._members[service] = [*members[1:], new]
        self._put(service, terminating=[members[0]])
        return f"{_name(service)}: pod {new} replaces pod {members[0]}"

    def _change_policies(self) -> str:
        """Change traffic policies or session affinity. Each of these Services has an endpoint on this node."""
        service = self._of_class("policies")
        changes: list[dict[str, Any]] = [
            {"internalTrafficPolicy": self._random.choice(("Cluster", "Local"))},
            {"externalTrafficPolicy": self._random.choice(("Cluster", "Local"))},
            {"sessionAffinity": self._random.choice(("None", "ClientIP"))},
        ]
        change = self._random.choice(changes)
        self._extra[service] |= change
        self._put(service)
        return f"{_name(service)}: {change}"

    def _put_transient(self) -> str:
        number = self._random.randrange(TRANSIENT)
        protocol = self._random.choice(("TCP", "UDP"))
        extra: dict[str, Any] = {"type": self._random.choice(("ClusterIP", "NodePort", "LoadBalancer"))}
        if self._random.random() < 0.3:
            extra["externalIPs"] = [f"203.0.113.{number + 1}", f"2001:db8:7::{number + 1:x}"]
        if self._random.random() < 0.3:
            extra["sessionAffinity"] = "ClientIP"
        name = f"transient-{number}"
        ips = f"10.96.3.{number + 1}", f"fd00:10:96:3::{number + 1:x}"
        service = objects.service(name, *ips, protocol=protocol, **extra)
        if extra["type"] != "ClusterIP":
            service["spec"]["ports"][0]["nodePort"] = NODE_PORT + 100 + number
        pods = self._random.sample(range(PODS), self._random.choice((0, 1, 2, 5, PODS)))
        self._transient[number] = [service, *_slices(name, 0, pods, protocol=protocol)]
        for each in self._transient[number]:
            self._api.apply(each)
        return f"{name} has {len(pods)} endpoints, {protocol}, type {extra['type']}"

    def _delete_transient(self) -> str:
        if not self._transient:
            return self._put_transient()
        number = self._random.choice(sorted(self._transient))
        self._remove(number)
        return f"transient-{number} is deleted"

    def _remove(self, number: int) -> None:
        for each in self._transient.pop(number):
            self._api.delete(each)

    def _put(self, service: int, terminating: Sequence[int] = ()) -> None:
        protocol = "UDP" if self._label(service) == "udp" else "TCP"
        found = objects.service(_name(service), *_cluster_ips(service), protocol=protocol, **self._extra[service])
        found["spec"]["ports"][0]["nodePort"] = NODE_PORT + service
        self._api.apply(found)
        for each in _slices(_name(service), service, self._members[service], terminating, protocol=protocol):
            self._api.apply(each)


def _name(service: int) -> str:
    return f"{CLASSES[service // PER_CLASS]}-{service % PER_CLASS}"


def _cluster_ips(service: int) -> tuple[str, str]:
    return f"10.96.1.{service + 1}", f"fd00:10:96:1::{service + 1:x}"


def _slices(
    name: str, service: int, ready: Sequence[int], terminating: Sequence[int] = (), *, protocol: str
) -> Iterator[objects.Object]:
    conditions = [(number, True) for number in ready] + [(number, False) for number in terminating]
    for version, family in enumerate(Family):
        endpoints = [
            objects.endpoint(
                pod_addresses(service, number)[version],
                NODES[number % len(NODES)],
                ready=is_ready,
                terminating=not is_ready,
            )
            for number, is_ready in conditions
        ]
        yield objects.endpoint_slice(name, endpoints, family=family.value, port=PORT, protocol=protocol)
