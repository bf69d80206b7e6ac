"""What `SIZE=` selects: the cluster sizes to measure in each mode, and how often to repeat each measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

MODES = ("iptables", "nftables")


class Repetitions(Struct, frozen=True):
    """How often to repeat each measurement for one cluster size; 0 skips it.

    first_syncs: starts of the daemon on a node without rules.
    rounds, connections: rounds of connections, and connections per round.
    endpoint_changes: changes of one endpoint, each followed by the reverse change.
    service_changes: Services to create and delete.
    rolling_updates, rolling_endpoints: rolling updates, and endpoints to replace in each.
    bursts, burst_changes: bursts of simultaneous changes, each followed by the reverse burst, and changes per burst.
    annotation_bursts: bursts of as many watch events in which only an annotation differs.
    transfers, transfer_bytes: transfers over established connections, and the size of each.
    """

    first_syncs: int
    rounds: int
    connections: int
    endpoint_changes: int = 0
    service_changes: int = 0
    rolling_updates: int = 0
    rolling_endpoints: int = 100
    bursts: int = 0
    burst_changes: int = 1000
    annotation_bursts: int = 0
    transfers: int = 0
    transfer_bytes: int = 2 << 30


class Task(Struct, frozen=True):
    """One mode and cluster size to measure."""

    mode: str
    services: int
    endpoints: int
    repetitions: Repetitions


class Shape(NamedTuple):
    """A cluster: its number of Services, and the number of endpoints of each."""

    services: int
    endpoints: int = 10


class Size(Struct, frozen=True):
    """A value of `SIZE=`: the clusters to measure briefly and in full, by mode.

    Brief measurements cover only the first sync, memory, kernel objects and connections.
    """

    brief: dict[str, tuple[Shape, ...]]
    full: dict[str, tuple[Shape, ...]]
    brief_repetitions: Repetitions
    full_repetitions: Repetitions

    def tasks(self, modes: Sequence[str], services: Sequence[int] = (), endpoints: int = 0) -> Iterator[Task]:
        """Yield the tasks by mode, in increasing order of size.

        `services` overrides the clusters to measure in full, and `endpoints` the number of endpoints of each Service.
        Every mode starts with one Service, which is the baseline for memory.
        """
        for mode in modes:
            full = {Shape(count) for count in services} or set(self.full[mode])
            smallest = Shape(1, min(shape.endpoints for shape in full))
            brief = {smallest} if services else {smallest, *self.brief[mode]}
            if endpoints:
                brief, full = ({Shape(each.services, endpoints) for each in shapes} for shapes in (brief, full))
            for shape in sorted(brief | full, key=lambda shape: (shape.services, shape.endpoints)):
                repetitions = self.full_repetitions if shape in full else self.brief_repetitions
                yield Task(mode, *shape, repetitions)


_BRIEF = Repetitions(first_syncs=1, rounds=5, connections=2000, transfers=5)
_FULL = Repetitions(
    first_syncs=3,
    rounds=7,
    connections=3000,
    endpoint_changes=15,
    service_changes=10,
    rolling_updates=3,
    bursts=3,
    annotation_bursts=3,
    transfers=5,
)

SIZES = {
    "tiny": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (Shape(20),)),
        brief_repetitions=Repetitions(first_syncs=1, rounds=1, connections=20, transfers=1, transfer_bytes=1 << 20),
        full_repetitions=Repetitions(
            first_syncs=1,
            rounds=2,
            connections=50,
            endpoint_changes=1,
            service_changes=1,
            rolling_updates=1,
            rolling_endpoints=10,
            bursts=1,
            burst_changes=30,
            annotation_bursts=1,
            transfers=1,
            transfer_bytes=1 << 20,
        ),
    ),
    "small": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (Shape(1000),)),
        brief_repetitions=Repetitions(first_syncs=1, rounds=9, connections=1500, transfers=3),
        full_repetitions=Repetitions(
            first_syncs=3,
            rounds=9,
            connections=1500,
            endpoint_changes=4,
            service_changes=3,
            rolling_updates=1,
            bursts=1,
            annotation_bursts=3,
            transfers=3,
        ),
    ),
    "medium": Size(
        brief={"iptables": (Shape(10_000),), "nftables": ()},
        full={"iptables": (Shape(1000), Shape(5000)), "nftables": (Shape(1000), Shape(10_000))},
        brief_repetitions=_BRIEF,
        full_repetitions=_FULL,
    ),
    "large": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, tuple(map(Shape, (1000, 5000, 10_000, 20_000)))),
        brief_repetitions=_BRIEF,
        full_repetitions=_FULL,
    ),
    "huge": Size(
        brief={"iptables": (Shape(44_000, 1), Shape(5000, 50)), "nftables": (Shape(10_000, 1),)},
        full={"iptables": (Shape(10_000, 1),), "nftables": (Shape(5000, 50), Shape(44_000, 1))},
        brief_repetitions=_BRIEF,
        full_repetitions=replace(_FULL, first_syncs=2, rounds=5, connections=2000),
    ),
}
