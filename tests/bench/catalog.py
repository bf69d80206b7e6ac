"""Every figure that the benchmark can give: its name, unit, floor, and how it comes from samples in seconds. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from tests.bench.figures import Figure, Run, Spread, mean, median, scaled

Samples: TypeAlias = Mapping[str, Sequence[float]]
"""Samples by the name of their figure. Times are in seconds."""

BARE = "bare"
APART = "25 apart"
EMPTY = "1 Service"
DIRECT = "no rules"
PARSED = "parser"
"""What floors are: the bare transactions that the kernel was given; blocks of 25 Services with a program for each; the
same mode with one Service; connections to pods on a node without rules; a parser that looks for nothing in the JSON."""


class Definition(Struct, frozen=True):
    """A figure, and the factor that brings its samples to its unit.

    `floor_is` is "" for those that have no floor, `mode` for those of both modes.
    """

    name: str
    unit: str
    factor: float = 1.0
    summed: Callable[[Sequence[float]], Spread] = median
    floor_is: str = ""
    more_is_better: bool = False
    mode: str = ""

    def figure(self, samples: Sequence[float], floor: Sequence[float]) -> Figure:
        """Return the figure; `floor` are samples too, none if it was not measured."""
        return Figure(
            self.name,
            self.unit,
            scaled(self.summed(samples), self.factor),
            scaled(self.summed(floor), self.factor) if floor else None,
            self.floor_is if floor else "",
            self.more_is_better,
        )


def _timed(name: str) -> Iterator[Definition]:
    yield Definition(name, "ms", 1e3, floor_is=BARE)
    yield Definition(f"{name}: CPU", "ms", 1e3, mean, BARE)


def _event(form: str) -> Iterator[Definition]:
    yield Definition(f"event, {form}: bytes", "B")
    yield Definition(f"event, {form}: CPU", "us", 1e6, mean, PARSED)


CATALOG = (
    Definition("first sync", "s", floor_is=BARE),
    Definition("first sync: in blocks", "s", floor_is=APART, mode="iptables"),
    Definition("first sync: CPU", "s", floor_is=BARE),
    Definition("restart: CPU", "s"),
    *_timed("one endpoint"),
    *_timed("new Service"),
    *_timed("deleted Service"),
    Definition("rolling update", "ms", 1e3, floor_is=BARE),
    Definition("rolling update: CPU/change", "ms", 1e3, mean, BARE),
    Definition("burst", "ms", 1e3, floor_is=BARE),
    Definition("burst: CPU/change", "ms", 1e3, mean, BARE),
    Definition("burst: commits", ""),
    *_event("JSON"),
    *_event("protobuf"),
    Definition("RSS after first sync", "MB", floor_is=EMPTY),
    Definition("RSS after changes", "MB", floor_is=EMPTY),
    Definition("RSS at peak", "MB", floor_is=EMPTY),
    Definition("kernel: chains", "", floor_is=BARE),
    Definition("kernel: rules", "", floor_is=BARE),
    Definition("kernel: sets", "", floor_is=BARE),
    Definition("kernel: elements", "", floor_is=BARE),
    Definition("connect to a VIP: median", "us", 1e6, floor_is=DIRECT),
    Definition("connect to a VIP: p99", "us", 1e6, floor_is=DIRECT),
    Definition("connections to VIPs", "1/s", floor_is=DIRECT, more_is_better=True),
    Definition("connect past the rules", "us", 1e6, floor_is=DIRECT),
)
"""In the order of the table. "Past the rules" are connections to no Service, which meet the rules all the same."""

NAMES = tuple(each.name for each in CATALOG)


def figures(found: Samples, floors: Samples) -> list[Figure]:
    """Return the figures for which there are samples. Raises `KeyError` for a name that is not in the catalog."""
    unknown = {*found, *floors} - set(NAMES)
    if unknown:
        raise KeyError(f"no figure is called {', '.join(sorted(unknown))}")
    return [each.figure(found[each.name], floors.get(each.name, ())) for each in CATALOG if found.get(each.name)]


def with_memory_floors(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, each with the memory that the same mode needs for one Service as the floor of its own."""
    smallest = {run.mode: run for run in sorted(runs, key=lambda run: -run.services)}
    return [replace(run, figures=[_with_floor(each, smallest[run.mode]) for each in run.figures]) for run in runs]


def _with_floor(figure: Figure, smallest: Run) -> Figure:
    if not figure.name.startswith("RSS"):
        return figure
    found = {each.name: each.found for each in smallest.figures}
    floor = found.get(figure.name) or found.get("RSS after first sync")
    return replace(figure, floor=floor, floor_is=EMPTY)
