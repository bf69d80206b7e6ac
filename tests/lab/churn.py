"""A cluster that changes at random, with Services that keep some endpoints all the time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from msgspec.structs import replace

from kproxy.model.delta import Delete, Delta, Upsert
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.lab.connection_load import LoadTarget
from tests.lab.topology import NODE, NODE_ADDRESSES, Host

NODES = (NODE, "node-2", "node-3")
STABLE_SERVICES = 6
"""Number of Services that always exist."""

TRANSIENT_SERVICES = 14
"""Number of Services that come and go; their endpoints are pods of the stable Services."""

PODS = 27
"""Pods of each stable Service: enough for pool sizes from 1 to 32."""

PORT = 8080
NODE_PORT = 30080
SHARED_IPS = ("203.0.113.200", "2001:db8:7::200")
"""External IPs that several transient Services claim at once."""


def pod_addresses(service: int, number: int) -> tuple[str, str]:
    """Return the addresses of a pod. Pods are spread over the nodes in turn."""
    subnet, host = number % len(NODES) + 1, service * 16 + number // len(NODES) + 1
    return f"10.244.{subnet}.{host}", f"fd00:10:244:{subnet}::{host:x}"


def addresses_on(node: str) -> list[str]:
    """Return the addresses of all pods of a node."""
    numbers = (number for number in range(PODS) if NODES[number % len(NODES)] == node)
    return [
        address
        for number in numbers
        for service in range(STABLE_SERVICES)
        for address in pod_addresses(service, number)
    ]


class Churn:
    """The cluster's objects, and random changes to them as deltas."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.services: dict[str, Service] = {}
        self.members: dict[str, set[tuple[int, int]]] = {}
        for number in range(STABLE_SERVICES):
            self.services[_stable(number)] = _stable_service(number)
            self.members[_stable(number)] = set(_kept(number))
        self._changes: list[tuple[int, Callable[[], list[Delta]]]] = [
            (6, self._resize_stable),
            (4, self._swap_stable),
            (3, self._respec_stable),
            (3, self._put_transient),
            (3, self._resize_transient),
            (2, self._remove_transient),
        ]

    def objects(self) -> tuple[tuple[Service, ...], tuple[EndpointSlice, ...]]:
        """Return all current objects."""
        slices = chain.from_iterable(self._slices(name) for name in self.services)
        return tuple(self.services.values()), tuple(slices)

    def batch(self, count: int) -> list[Delta]:
        """Make `count` changes and return their deltas in order."""
        weights = [weight for weight, _ in self._changes]
        chosen = self._random.choices([change for _, change in self._changes], weights, k=count)
        return [delta for change in chosen for delta in change()]

    def targets(self, inside: Host, outside: Host, *, now: bool = False) -> list[LoadTarget]:
        """Return the frontends of the stable Services that have endpoints at all times.

        Any pod of a Service may answer; with `now`, only its current endpoints.
        """
        found = []
        for number in range(STABLE_SERVICES):
            service = self.services[_stable(number)]
            members = self.members[_stable(number)] if now else {(number, each) for each in range(PODS)}
            pods = tuple(sorted(address for member in members for address in pod_addresses(*member)))
            found += [LoadTarget(inside, address, 80, pods) for address in service.cluster_ips]
            found += [LoadTarget(outside, address, 80, pods) for address in (*service.external_ips, *service.vips)]
            found += [LoadTarget(outside, address, NODE_PORT + number, pods) for address in NODE_ADDRESSES]
        return found

    def frontends(self) -> list[str]:
        """Return the addresses that belong to stable Services only."""
        stable = [self.services[_stable(number)] for number in range(STABLE_SERVICES)]
        return [address for each in stable for address in (*each.cluster_ips, *each.external_ips, *each.vips)]

    # Changes

    def _resize_stable(self) -> list[Delta]:
        """Give a Service a random number of endpoints, always including the ones that it keeps."""
        number = self._random.randrange(STABLE_SERVICES)
        more = self._random.sample(range(PODS), self._random.choice((0, 0, 1, 2, 3, 5, 9, 14, 20, PODS)))
        self.members[_stable(number)] = _kept(number) | {(number, each) for each in more}
        return self._upserts(_stable(number))

    def _swap_stable(self) -> list[Delta]:
        """Replace one endpoint by another."""
        number = self._random.randrange(STABLE_SERVICES)
        members = self.members[_stable(number)]
        removable = sorted(members - _kept(number))
        if removable:
            members.remove(self._random.choice(removable))
        members.add((number, self._random.randrange(PODS)))
        return self._upserts(_stable(number))

    def _respec_stable(self) -> list[Delta]:
        """Change traffic policies, session affinity or source ranges; the client and a local pod stay allowed."""
        name = _stable(self._random.randrange(STABLE_SERVICES))
        chance = self._random
        changes: list[dict[str, Any]] = [
            {"internal_local": chance.random() < 0.5},
            {"external_local": chance.random() < 0.5},
            {"affinity_seconds": chance.choice((0, 0, 1, 60, 10_800))},
            {"source_ranges": chance.choice(((), ("198.51.100.0/24", "2001:db8:51::/64")))},
        ]
        self.services[name] = replace(self.services[name], **chance.choice(changes))
        return [Upsert(self.services[name])]

    def _put_transient(self) -> list[Delta]:
        """Create a Service, or replace all fields of an existing one."""
        number = self._random.randrange(TRANSIENT_SERVICES)
        name = f"demo/transient-{number:02}"
        self.services[name] = self._transient_service(number)
        self.members.setdefault(name, set())
        return [Upsert(self.services[name]), *self._upserts(name)]

    def _resize_transient(self) -> list[Delta]:
        names = sorted(name for name in self.services if "transient" in name)
        if not names:
            return self._put_transient()
        name = self._random.choice(names)
        size = self._random.choice((0, 0, 1, 2, 3, 4, 6, 12, 25, 40))
        all_pods = [(service, number) for service in range(STABLE_SERVICES) for number in range(PODS)]
        self.members[name] = set(self._random.sample(all_pods, size))
        return self._upserts(name)

    def _remove_transient(self) -> list[Delta]:
        names = sorted(name for name in self.services if "transient" in name)
        if not names:
            return self._put_transient()
        name = self._random.choice(names)
        slices = list(self._slices(name))
        del self.services[name], self.members[name]
        namespace, _, own = name.partition("/")
        return [Delete(Service, namespace, own), *(Delete(EndpointSlice, each.namespace, each.name) for each in slices)]

    def _transient_service(self, number: int) -> Service:
        chance = self._random.random
        return Service(
            "demo",
            f"transient-{number:02}",
            (f"10.96.2.{number + 1}", f"fd00:10:96:2::{number + 1:x}"),
            tuple(
                ServicePort(name, 80 + index, "TCP", 31000 + 2 * number + index if chance() < 0.5 else 0)
                for index, name in enumerate(("main", "more")[: self._random.choice((1, 2))])
            ),
            affinity_seconds=self._random.choice((0, 0, 0, 5, 10_800)),
            internal_local=chance() < 0.2,
            external_local=chance() < 0.4,
            external_ips=SHARED_IPS if chance() < 0.4 else (),
            vips=(f"203.0.113.{100 + number}", f"2001:db8:7::{100 + number}") if chance() < 0.5 else (),
            source_ranges=("192.0.2.0/24", "2001:db8:9::/64") if chance() < 0.3 else (),
        )

    # Objects

    def _upserts(self, name: str) -> list[Delta]:
        return [Upsert(each) for each in self._slices(name)]

    def _slices(self, name: str) -> Iterable[EndpointSlice]:
        namespace, _, own = name.partition("/")
        ports = tuple(EndpointPort(each, PORT, "TCP") for each in ("main", "more"))
        for index, family in enumerate((Family.IPV4, Family.IPV6)):
            endpoints = tuple(
                Endpoint(pod_addresses(service, number)[index], NODES[number % len(NODES)])
                for service, number in sorted(self.members[name])
            )
            yield EndpointSlice(namespace, f"{own}-{family.value.lower()}", name, family, endpoints, ports)


def _stable(number: int) -> str:
    return f"demo/stable-{number}"


def _kept(number: int) -> set[tuple[int, int]]:
    """Return the endpoints that a stable Service always keeps; at least one is on this node."""
    return {(number, each) for each in range(number % 3 + 1)}


def _stable_service(number: int) -> Service:
    return Service(
        "demo",
        f"stable-{number}",
        (f"10.96.1.{number + 1}", f"fd00:10:96:1::{number + 1:x}"),
        (ServicePort("main", 80, "TCP", NODE_PORT + number),),
        external_ips=(f"203.0.113.{number + 1}", f"2001:db8:7::{number + 1:x}"),
        vips=(f"203.0.113.{number + 51}", f"2001:db8:7::{number + 51:x}"),
    )
