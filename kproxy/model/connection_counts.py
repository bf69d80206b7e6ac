"""Connections to Services and endpoints, as the kernel counts them, and what can be derived from the counts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeAlias, TypeVar

from msgspec import Struct, field

from kproxy.model.types import Family

_K = TypeVar("_K", bound=Hashable)
Counts: TypeAlias = Mapping[Family, "ConnectionCounts"]
"""The counts of each IP family."""


class Destination(NamedTuple):
    """What a counter counts connections to: a frontend or an endpoint of a service port.

    `service_port` is `namespace/name:port`, or `namespace/name` if the port has no name. It can be cut off with `...`.
    `address` is `IP:port` for an endpoint, and `IP:port/PROTOCOL` or `NodePort number/PROTOCOL` for a frontend.
    """

    service_port: str
    address: str


class ConnectionCounts(Struct, frozen=True):
    """How many connections the kernel has counted in one IP family, in the current life of each counter.

    A counter starts at 0 when kproxy writes the map element or rule that it is a part of. iptables mode counts only
    endpoints. nftables mode does not count the endpoints of Services with session affinity.
    """

    frontends: dict[Destination, int] = field(default_factory=dict)
    endpoints: dict[Destination, int] = field(default_factory=dict)

    @property
    def services(self) -> dict[Destination, int]:
        """The counts that add up to the connections of each Service."""
        return self.frontends or self.endpoints


class CountsUnavailableError(Exception):
    """The counters cannot be read. The message gives the reason on one line."""


class ServicePortName(NamedTuple):
    """The parts of the name of a service port. `port` is "" if the port has no name."""

    namespace: str
    service: str
    port: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.service}:{self.port}" if self.port else f"{self.namespace}/{self.service}"


OTHERS = ServicePortName("", "", "")
"""Stands for all service ports that have no series of their own."""


def parse_service_port(text: str) -> ServicePortName:
    """Split `namespace/name:port` or `namespace/name`."""
    namespace, _, rest = text.partition("/")
    service, _, port = rest.partition(":")
    return ServicePortName(namespace, service, port)


def new_connections(before: Mapping[_K, int], after: Mapping[_K, int]) -> Counter[_K]:
    """Return how many connections each counter has counted between two readings.

    A counter that is new, or that is smaller than before, has started at 0 meanwhile.
    """
    found: Counter[_K] = Counter()
    for key, count in after.items():
        old = before.get(key, 0)
        found[key] = count - old if count >= old else count
    return found


class ConnectionTotals:
    """Connections of each service port since the first reading, which never decrease while the service port exists.

    At most `limit` service ports are distinguished, including `OTHERS`. In the first reading, those with the most
    connections are selected. Later, a new service port replaces one that has been removed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last: dict[tuple[Family, Destination], int] = {}
        self._totals: dict[str, int] = {}
        self._others: int | None = None

    def update(self, counts: Counts) -> None:
        """Add what has been counted since the previous reading."""
        now = {(family, key): count for family, each in counts.items() for key, count in each.services.items()}
        added: Counter[str] = Counter()
        for (_, destination), new in new_connections(self._last, now).items():
            added[destination.service_port] += new
        self._last = now
        self._select(added)
        others = sum(added[each] for each in added if each not in self._totals)
        for each in self._totals:
            self._totals[each] += added[each]
        if self._others is not None or len(added) > len(self._totals):
            self._others = (self._others or 0) + others

    def _select(self, added: Counter[str]) -> None:
        self._totals = {each: total for each, total in self._totals.items() if each in added}
        free = self._limit - 1 - len(self._totals)
        candidates = [each for each in added if each not in self._totals]
        for each in _greatest(candidates, added, free):
            self._totals[each] = 0

    def series(self) -> dict[ServicePortName, int]:
        """Return the connections of each service port, and of `OTHERS` if there are any."""
        found = Counter[ServicePortName]()
        for name, total in self._totals.items():
            found[parse_service_port(name)] += total
        return {**found, **({OTHERS: self._others} if self._others is not None else {})}


def _greatest(names: Iterable[str], counts: Counter[str], number: int) -> list[str]:
    return sorted(names, key=lambda name: (-counts[name], name))[: max(number, 0)]
