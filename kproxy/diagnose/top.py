"""The report of `kproxy top`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from kproxy.diagnose.report import Report, ReportPart
from kproxy.model.connection_counts import (
    ConnectionCounts,
    Counts,
    Destination,
    ServicePortName,
    new_connections,
    parse_service_port,
)

TopOrder: TypeAlias = Literal["connections", "rate", "name"]
TopMode: TypeAlias = Literal["iptables", "nftables"]
_Key: TypeAlias = tuple[ServicePortName, str]
_Select: TypeAlias = Callable[[ConnectionCounts], Mapping[Destination, int]]


class CountedAddress(ReportPart, frozen=True, kw_only=True):
    """A frontend or an endpoint: its address, the connections that its counter shows, and the new ones per second."""

    address: str
    connections: int
    rate: float | None = None


class ServiceConnections(ReportPart, frozen=True, kw_only=True):
    """The connections to one service port, and the new ones per second.

    `port` is the name of the port, or "" if it has none. iptables mode does not count the connections to each frontend.
    nftables mode does not count the endpoints of Services with session affinity.
    """

    namespace: str
    service: str
    port: str
    connections: int
    rate: float | None = None
    frontends: tuple[CountedAddress, ...] = ()
    endpoints: tuple[CountedAddress, ...] = ()


class Top(Report, frozen=True, kw_only=True):
    """Service ports and their connections, in the requested order.

    `connections` and `rate` are the sums over all service ports, including the `omitted` ones. Rates are in connections
    per second, averaged over `seconds`. Without a second reading of the counters, there are no rates.
    """

    mode: TopMode
    seconds: float | None
    connections: int
    rate: float | None
    services: tuple[ServiceConnections, ...]
    omitted: int = 0


class TopQuery(Struct, frozen=True, kw_only=True):
    """What to report: all Services, or `service` (`namespace/name`) if it is not "".

    `limit` is the maximum number of service ports, or 0 for all. Without `details`, frontends and endpoints are
    omitted.
    """

    service: str = ""
    order: TopOrder = "connections"
    limit: int = 0
    details: bool = False


class Elapsed(Struct, frozen=True):
    """An earlier reading of the counters, and the seconds since then."""

    counts: Counts
    seconds: float


def make_top(mode: TopMode, counts: Counts, earlier: Elapsed | None, query: TopQuery) -> Top:
    """Report the connections that counters show. The rates are those since the `earlier` reading."""
    services = _Sums(counts, earlier, lambda each: each.services)
    by_port: Counter[ServicePortName] = Counter()
    new_by_port: Counter[ServicePortName] = Counter()
    for (name, _), count in services.total.items():
        by_port[name] += count
    for (name, _), count in services.new.items():
        new_by_port[name] += count
    selected = [name for name in by_port if query.service in ("", f"{name.namespace}/{name.service}")]
    keys: dict[TopOrder, Callable[[ServicePortName], tuple[object, ...]]] = {
        "connections": lambda name: (-by_port[name], name),
        "rate": lambda name: (-new_by_port[name], -by_port[name], name),
        "name": lambda name: name,
    }
    selected.sort(key=keys[query.order])
    shown = selected[: query.limit or None]
    frontends: dict[ServicePortName, list[CountedAddress]] = {}
    endpoints: dict[ServicePortName, list[CountedAddress]] = {}
    if query.details:
        frontends = _Sums(counts, earlier, lambda each: each.frontends).addresses(shown)
        endpoints = _Sums(counts, earlier, lambda each: each.endpoints).addresses(shown)
    return Top(
        mode=mode,
        seconds=None if earlier is None else round(earlier.seconds, 3),
        connections=sum(by_port[name] for name in selected),
        rate=_rate(sum(new_by_port[name] for name in selected), earlier),
        services=tuple(
            ServiceConnections(
                namespace=name.namespace,
                service=name.service,
                port=name.port,
                connections=by_port[name],
                rate=_rate(new_by_port[name], earlier),
                frontends=tuple(frontends.get(name, ())),
                endpoints=tuple(endpoints.get(name, ())),
            )
            for name in shown
        ),
        omitted=len(selected) - len(shown),
    )


class _Sums:
    """The sums over both IP families of the counters that `select` returns for each of them."""

    def __init__(self, counts: Counts, earlier: Elapsed | None, select: _Select) -> None:
        self._earlier = earlier
        self.total: Counter[_Key] = Counter()
        self.new: Counter[_Key] = Counter()
        for family, each in counts.items():
            self._add(self.total, select(each))
            if earlier is not None:
                before = earlier.counts.get(family)
                self._add(self.new, new_connections(select(before) if before is not None else {}, select(each)))

    @staticmethod
    def _add(sums: Counter[_Key], counts: Mapping[Destination, int]) -> None:
        for destination, count in counts.items():
            sums[parse_service_port(destination.service_port), destination.address] += count

    def addresses(self, names: Iterable[ServicePortName]) -> dict[ServicePortName, list[CountedAddress]]:
        """Return the addresses of these service ports, those with the most connections first."""
        found: dict[ServicePortName, list[CountedAddress]] = {name: [] for name in names}
        for key, connections in sorted(self.total.items(), key=lambda item: (-item[1], item[0])):
            name, address = key
            if name in found:
                rate = _rate(self.new[key], self._earlier)
                found[name].append(CountedAddress(address=address, connections=connections, rate=rate))
        return found


def _rate(new: int, earlier: Elapsed | None) -> float | None:
    return None if earlier is None else round(new / earlier.seconds, 3)
