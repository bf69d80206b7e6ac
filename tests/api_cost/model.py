"""What many nodes cost their API servers, computed from measured costs. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from tests.api_cost.measure import Costs
from tests.api_cost.storm import BOOKMARK_INTERVAL, KINDS

HOUR = 3600.0
MEAN_WATCH = 450.0
"""Seconds that a watch lasts on average: kproxy asks for 300 to 600, as client-go does."""


class Load(Struct, frozen=True):
    """How often objects change, in changes per hour of the whole cluster; `node` counts those of a node's own Node."""

    name: str
    services: int
    endpoint_slices: int
    node: int


LOADS = (
    Load("quiet", services=1, endpoint_slices=60, node=12),
    Load("busy", services=60, endpoint_slices=36_000, node=60),
)
"""A kubelet reports the status of an unchanged Node every 5 minutes. Its heartbeats are Leases, which are not watched.
In the busy cluster, 10 EndpointSlices change per second."""


class Row(Struct, frozen=True):
    """The cost of a load per node and hour: requests, bytes, and what the bytes are spent on."""

    load: str
    encoding: str
    requests: float
    bytes: float
    reconnects: float
    bookmarks: float
    events: float


def row(costs: Costs, load: Load) -> Row:
    """Return the requests per node and hour, the bytes per node and hour, and the parts of these bytes."""
    requests = len(KINDS) * HOUR / MEAN_WATCH
    reconnects = requests * costs.reconnect
    bookmarks = HOUR / BOOKMARK_INTERVAL * costs.bookmarks
    events = load.services * costs.service + load.endpoint_slices * costs.endpoint_slice + load.node * costs.node
    return Row(
        load.name, costs.encoding, requests, reconnects + bookmarks + events, reconnects, bookmarks, float(events)
    )


def rows(costs: Costs) -> Iterator[Row]:
    """Yield the rows of all loads."""
    for load in LOADS:
        yield row(costs, load)
