"""Figures, their spread, their floors, and the comparison of two runs. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

FORMAT = 1
"""The version of the JSON results; it grows when a figure comes to mean something else."""


class Spread(Struct, frozen=True, omit_defaults=True):
    """What several samples of one thing come to: their median (or mean), the least, the greatest, and their number."""

    value: float
    low: float
    high: float
    samples: int


class Figure(Struct, frozen=True, omit_defaults=True):
    """One figure and, if there is one, its floor: the same work in the same run without kproxy.

    `floor_is` says in a few words what the floor is. `more_is_better` is true for rates.
    """

    name: str
    unit: str
    found: Spread
    floor: Spread | None = None
    floor_is: str = ""
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """How many times the floor it is, None without a floor or with one of 0."""
        return self.found.value / self.floor.value if self.floor and self.floor.value else None


class Run(Struct, frozen=True):
    """All figures of one mode and one size of cluster."""

    mode: str
    services: int
    endpoints: int
    figures: list[Figure]


class Machine(Struct, frozen=True):
    """Where a benchmark ran. `load` is the load average of one minute before it began: that of others."""

    kernel: str
    cpus: int
    cpu: str
    memory: float
    python: str
    iptables: str
    kproxy: str
    commit: str
    load: float


class Results(Struct, frozen=True):
    """A whole benchmark, as it is written to JSON. `date` is of ISO 8601, `seconds` how long it took."""

    format: int
    date: str
    size: str
    seconds: float
    machine: Machine
    runs: list[Run]


class Comparison(Struct, frozen=True):
    """One figure in two runs; `ratio` is new/old, None if the old one is 0."""

    mode: str
    services: int
    figure: str
    unit: str
    old: float
    new: float
    ratio: float | None
    apart: bool
    """Whether the spreads do not touch: otherwise the difference may be chance."""


def median(samples: Sequence[float]) -> Spread:
    """Return the median of samples with their range. Raises `ValueError` without samples."""
    return _spread(statistics.median, samples)


def mean(samples: Sequence[float]) -> Spread:
    """Return the mean of samples with their range, for what is counted in steps coarser than one sample."""
    return _spread(statistics.fmean, samples)


def exact(value: float) -> Spread:
    """Return what was measured once."""
    return Spread(value, value, value, 1)


def scaled(spread: Spread, factor: float) -> Spread:
    """Return a spread in another unit."""
    return Spread(spread.value * factor, spread.low * factor, spread.high * factor, spread.samples)


def compare(old: Results, new: Results) -> Iterator[Comparison]:
    """Yield each figure that both have for the same mode and size, in the order of the new one."""
    known = {
        (run.mode, run.services, run.endpoints, figure.name, figure.unit): figure.found
        for run in old.runs
        for figure in run.figures
    }
    for run in new.runs:
        for figure in run.figures:
            before = known.get((run.mode, run.services, run.endpoints, figure.name, figure.unit))
            if before is None:
                continue
            now = figure.found
            ratio = now.value / before.value if before.value else None
            apart = now.low > before.high or now.high < before.low
            yield Comparison(run.mode, run.services, figure.name, figure.unit, before.value, now.value, ratio, apart)


def _spread(middle: Callable[[Sequence[float]], float], samples: Sequence[float]) -> Spread:
    if not samples:
        raise ValueError("a figure needs at least one sample")
    return Spread(middle(samples), min(samples), max(samples), len(samples))
