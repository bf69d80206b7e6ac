"""What `SIZE=` selects: the cluster sizes to measure in each mode, and how often to repeat each measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

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


class Task(Struct, frozen=True):
    """One mode and cluster size to measure."""

    mode: str
    services: int
    repetitions: Repetitions


class Size(Struct, frozen=True):
    """A value of `SIZE=`: the numbers of Services to measure briefly and in full, by mode.

    Brief measurements cover only the first sync, memory, kernel objects and connections.
    """

    brief: dict[str, tuple[int, ...]]
    full: dict[str, tuple[int, ...]]
    brief_repetitions: Repetitions
    full_repetitions: Repetitions

    def tasks(self, modes: Sequence[str], services: Sequence[int] = ()) -> Iterator[Task]:
        """Yield the tasks by mode, in increasing order of size. `services` overrides the sizes to measure in full.

        Every mode starts with one Service, which is the baseline for memory.
        """
        for mode in modes:
            full = tuple(services) or self.full[mode]
            brief = {1} if services else {1, *self.brief[mode]}
            for count in sorted(brief | set(full)):
                yield Task(mode, count, self.full_repetitions if count in full else self.brief_repetitions)


_BRIEF = Repetitions(first_syncs=1, rounds=5, connections=2000)
_FULL = Repetitions(
    first_syncs=3,
    rounds=7,
    connections=3000,
    endpoint_changes=15,
    service_changes=10,
    rolling_updates=3,
    bursts=3,
    annotation_bursts=3,
)

SIZES = {
    "tiny": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (20,)),
        brief_repetitions=Repetitions(first_syncs=1, rounds=1, connections=20),
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
        ),
    ),
    "small": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (1000,)),
        brief_repetitions=Repetitions(first_syncs=1, rounds=9, connections=1500),
        full_repetitions=Repetitions(
            first_syncs=3,
            rounds=9,
            connections=1500,
            endpoint_changes=4,
            service_changes=3,
            rolling_updates=1,
            bursts=1,
            annotation_bursts=1,
        ),
    ),
    "medium": Size(
        brief={"iptables": (10_000,), "nftables": ()},
        full={"iptables": (1000, 5000), "nftables": (1000, 10_000)},
        brief_repetitions=_BRIEF,
        full_repetitions=_FULL,
    ),
    "large": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (1000, 5000, 10000, 20000)),
        brief_repetitions=_BRIEF,
        full_repetitions=_FULL,
    ),
}
