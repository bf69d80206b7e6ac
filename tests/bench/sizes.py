"""How much is measured: which sizes of cluster in which mode, and how often each thing is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

MODES = ("iptables", "nftables")


class Effort(Struct, frozen=True):
    """How often each thing is done for one size of cluster; 0: not at all.

    `changes` are endpoints that change and change back, `services` come and go, `rollings` are rolling updates of
    `rolled` endpoints, `bursts` are of `burst` changes at once and as many back, `idles` are as many watch events in
    which rules have no part, `connects` the connections of one of `rounds` rounds.
    """

    first_syncs: int
    rounds: int
    connects: int
    changes: int = 0
    services: int = 0
    rollings: int = 0
    rolled: int = 100
    bursts: int = 0
    burst: int = 1000
    idles: int = 0


class Task(Struct, frozen=True):
    """One mode and size of cluster, and the effort for it."""

    mode: str
    services: int
    effort: Effort


class Size(Struct, frozen=True):
    """A choice for `SIZE=`: of which sizes only the first sync, memory and connections are measured, of which all."""

    brief: dict[str, tuple[int, ...]]
    full: dict[str, tuple[int, ...]]
    brief_effort: Effort
    full_effort: Effort

    def tasks(self, modes: Sequence[str], services: Sequence[int] = ()) -> Iterator[Task]:
        """Yield what is to be measured, small before large. `services` are sizes to take instead of the own full ones.

        One Service comes first whatever the choice: it is the floor of the memory.
        """
        for mode in modes:
            full = tuple(services) or self.full[mode]
            brief = {1} if services else {1, *self.brief[mode]}
            for count in sorted(brief | set(full)):
                yield Task(mode, count, self.full_effort if count in full else self.brief_effort)


_ONCE = Effort(first_syncs=1, rounds=5, connects=2000)
_OFTEN = Effort(first_syncs=3, rounds=7, connects=3000, changes=15, services=10, rollings=3, bursts=3, idles=3)

SIZES = {
    "tiny": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (20,)),
        brief_effort=Effort(first_syncs=1, rounds=1, connects=20),
        full_effort=Effort(
            first_syncs=1,
            rounds=2,
            connects=50,
            changes=1,
            services=1,
            rollings=1,
            rolled=10,
            bursts=1,
            burst=30,
            idles=1,
        ),
    ),
    "small": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (1000,)),
        brief_effort=Effort(first_syncs=1, rounds=9, connects=1500),
        full_effort=Effort(
            first_syncs=3, rounds=9, connects=1500, changes=4, services=3, rollings=1, bursts=1, idles=1
        ),
    ),
    "medium": Size(
        brief={"iptables": (10_000,), "nftables": ()},
        full={"iptables": (1000, 5000), "nftables": (1000, 10_000)},
        brief_effort=_ONCE,
        full_effort=_OFTEN,
    ),
    "large": Size(
        brief=dict.fromkeys(MODES, ()),
        full=dict.fromkeys(MODES, (1000, 5000, 10000, 20000)),
        brief_effort=_ONCE,
        full_effort=_OFTEN,
    ),
}
