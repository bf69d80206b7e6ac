"""A cluster that changes at random, of which some Services keep some endpoints all the time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from msgspec.structs import replace

from kproxy.model.delta import Delete, Delta, Upsert
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.lab.connection_load import Way
from tests.lab.topology import NODE, NODE_ADDRESSES, Host

NODES = (NODE, "node-2", "node-3")
STEADY = 6
"""Services that are there all the time."""

FLEETING = 14
"""Services that come and go; they share the pods of all."""

PODS = 27
"""Pods of each steady Service: enough for the sizes from 1 to 32."""

PORT = 8080
NODE_PORT = 30080
SHARED_IPS = ("203.0.113.200", "2001:db8:7::200")
"""External IPs that several fleeting Services claim."""


def pod_addresses(service: int, number: int) -> tuple[str, str]:
    """Return the addresses of a pod; pod `n` is on the `n`-th node, round and round."""
    subnet, host = number % len(NODES) + 1, service * 16 + number // len(NODES) + 1
    return f"10.244.{subnet}.{host}", f"fd00:10:244:{subnet}::{host:x}"


def addresses_on(node: str) -> list[str]:
    """Return the addresses of all pods of a node."""
    numbers = (number for number in range(PODS) if NODES[number % len(NODES)] == node)
    return [address for number in numbers for service in range(STEADY) for address in pod_addresses(service, number)]


class Churn:
    """The objects, and random changes to them; each change is a list of deltas."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.services: dict[str, Service] = {}
        self.members: dict[str, set[tuple[int, int]]] = {}
        for number in range(STEADY):
            self.services[_steady(number)] = _steady_service(number)
            self.members[_steady(number)] = set(_kept(number))
        self._changes: list[tuple[int, Callable[[], list[Delta]]]] = [
            (6, self._resize_steady),
            (4, self._swap_steady),
            (3, self._respec_steady),
            (3, self._put_fleeting),
            (3, self._resize_fleeting),
            (2, self._remove_fleeting),
        ]

    def everything(self) -> tuple[tuple[Service, ...], tuple[EndpointSlice, ...]]:
        """Return all objects as they are now."""
        slices = chain.from_iterable(self._slices(name) for name in self.services)
        return tuple(self.services.values()), tuple(slices)

    def batch(self, count: int) -> list[Delta]:
        """Make so many changes and return their deltas in order."""
        weights = [weight for weight, _ in self._changes]
        chosen = self._random.choices([change for _, change in self._changes], weights, k=count)
        return [delta for change in chosen for delta in change()]

    def ways(self, inside: Host, outside: Host, *, now: bool = False) -> list[Way]:
        """Return the ways to the steady Services that lead to endpoints all the time.

        Any of a Service's pods may answer; with `now`, only those that are endpoints of it now.
        """
        found = []
        for number in range(STEADY):
            service = self.services[_steady(number)]
            members = self.members[_steady(number)] if now else {(number, each) for each in range(PODS)}
            pods = tuple(sorted(address for member in members for address in pod_addresses(*member)))
            found += [Way(inside, address, 80, pods) for address in service.cluster_ips]
            found += [Way(outside, address, 80, pods) for address in (*service.external_ips, *service.vips)]
            found += [Way(outside, address, NODE_PORT + number, pods) for address in NODE_ADDRESSES]
        return found

    def frontends(self) -> list[str]:
        """Return the addresses that only steady Services have."""
        steady = [self.services[_steady(number)] for number in range(STEADY)]
        return [address for each in steady for address in (*each.cluster_ips, *each.external_ips, *each.vips)]

    # Changes

    def _resize_steady(self) -> list[Delta]:
        """Give a Service any number of endpoints, those that it keeps among them."""
        number = self._random.randrange(STEADY)
        more = self._random.sample(range(PODS), self._random.choice((0, 0, 1, 2, 3, 5, 9, 14, 20, PODS)))
        self.members[_steady(number)] = _kept(number) | {(number, each) for each in more}
        return self._upserts(_steady(number))

    def _swap_steady(self) -> list[Delta]:
        """Move: one endpoint goes and another comes."""
        number = self._random.randrange(STEADY)
        members = self.members[_steady(number)]
        loose = sorted(members - _kept(number))
        if loose:
            members.remove(self._random.choice(loose))
        members.add((number, self._random.randrange(PODS)))
        return self._upserts(_steady(number))

    def _respec_steady(self) -> list[Delta]:
        """Change policies, session affinity or who may use the load balancer; a visitor and a local pod always may."""
        name = _steady(self._random.randrange(STEADY))
        chance = self._random
        changes: list[dict[str, Any]] = [
            {"internal_local": chance.random() < 0.5},
            {"external_local": chance.random() < 0.5},
            {"affinity_seconds": chance.choice((0, 0, 1, 60, 10_800))},
            {"source_ranges": chance.choice(((), ("198.51.100.0/24", "2001:db8:51::/64")))},
        ]
        self.services[name] = replace(self.services[name], **chance.choice(changes))
        return [Upsert(self.services[name])]

    def _put_fleeting(self) -> list[Delta]:
        """Add a Service, or change one that is there, in everything."""
        number = self._random.randrange(FLEETING)
        name = f"demo/fleeting-{number:02}"
        self.services[name] = self._fleeting_service(number)
        self.members.setdefault(name, set())
        return [Upsert(self.services[name]), *self._upserts(name)]

    def _resize_fleeting(self) -> list[Delta]:
        names = sorted(name for name in self.services if "fleeting" in name)
        if not names:
            return self._put_fleeting()
        name = self._random.choice(names)
        size = self._random.choice((0, 0, 1, 2, 3, 4, 6, 12, 25, 40))
        everybody = [(service, number) for service in range(STEADY) for number in range(PODS)]
        self.members[name] = set(self._random.sample(everybody, size))
        return self._upserts(name)

    def _remove_fleeting(self) -> list[Delta]:
        names = sorted(name for name in self.services if "fleeting" in name)
        if not names:
            return self._put_fleeting()
        name = self._random.choice(names)
        slices = list(self._slices(name))
        del self.services[name], self.members[name]
        namespace, _, own = name.partition("/")
        return [Delete(Service, namespace, own), *(Delete(EndpointSlice, each.namespace, each.name) for each in slices)]

    def _fleeting_service(self, number: int) -> Service:
        maybe = self._random.random
        return Service(
            "demo",
            f"fleeting-{number:02}",
            (f"10.96.2.{number + 1}", f"fd00:10:96:2::{number + 1:x}"),
            tuple(
                ServicePort(name, 80 + place, "TCP", 31000 + 2 * number + place if maybe() < 0.5 else 0)
                for place, name in enumerate(("main", "more")[: self._random.choice((1, 2))])
            ),
            affinity_seconds=self._random.choice((0, 0, 0, 5, 10_800)),
            internal_local=maybe() < 0.2,
            external_local=maybe() < 0.4,
            external_ips=SHARED_IPS if maybe() < 0.4 else (),
            vips=(f"203.0.113.{100 + number}", f"2001:db8:7::{100 + number}") if maybe() < 0.5 else (),
            source_ranges=("192.0.2.0/24", "2001:db8:9::/64") if maybe() < 0.3 else (),
        )

    # Objects

    def _upserts(self, name: str) -> list[Delta]:
        return [Upsert(each) for each in self._slices(name)]

    def _slices(self, name: str) -> Iterable[EndpointSlice]:
        namespace, _, own = name.partition("/")
        ports = tuple(EndpointPort(each, PORT, "TCP") for each in ("main", "more"))
        for place, family in enumerate((Family.IPV4, Family.IPV6)):
            endpoints = tuple(
                Endpoint(pod_addresses(service, number)[place], NODES[number % len(NODES)])
                for service, number in sorted(self.members[name])
            )
            yield EndpointSlice(namespace, f"{own}-{family.value.lower()}", name, family, endpoints, ports)


def _steady(number: int) -> str:
    return f"demo/steady-{number}"


def _kept(number: int) -> set[tuple[int, int]]:
    """Return the pods that a steady Service always has: at least one is on this node."""
    return {(number, each) for each in range(number % 3 + 1)}


def _steady_service(number: int) -> Service:
    return Service(
        "demo",
        f"steady-{number}",
        (f"10.96.1.{number + 1}", f"fd00:10:96:1::{number + 1:x}"),
        (ServicePort("main", 80, "TCP", NODE_PORT + number),),
        external_ips=(f"203.0.113.{number + 1}", f"2001:db8:7::{number + 1:x}"),
        vips=(f"203.0.113.{number + 51}", f"2001:db8:7::{number + 51:x}"),
    )
