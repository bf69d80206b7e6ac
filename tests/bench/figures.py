"""Figures with their spreads and baselines, and the comparison of two runs. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

FORMAT = 1
"""Version of the JSON results. Increase it when the meaning of a figure changes."""


class Spread(Struct, frozen=True, omit_defaults=True):
    """A summary of several samples: their median (or mean), minimum, maximum and number."""

    value: float
    low: float
    high: float
    samples: int


class Figure(
    Struct,
    frozen=True,
    omit_defaults=True,
    rename={"measured": "found", "baseline": "floor", "baseline_is": "floor_is"},
):
    """One figure and its baseline, if it has one: the same work in the same run without kproxy.

    `baseline_is` describes the baseline in a few words. `more_is_better` is true for rates. The JSON names of the
    fields are those of the committed results.
    """

    name: str
    unit: str
    measured: Spread
    baseline: Spread | None = None
    baseline_is: str = ""
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """The figure divided by its baseline; None if the baseline is missing or 0."""
        return self.measured.value / self.baseline.value if self.baseline and self.baseline.value else None


class Run(Struct, frozen=True):
    """All figures for one mode and cluster size."""

    mode: str
    services: int
    endpoints: int
    figures: list[Figure]


class Machine(Struct, frozen=True):
    """The machine that a benchmark ran on. `load` is its one-minute load average before the start."""

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
    """A complete benchmark, as written to JSON. `date` is in ISO 8601 format, `seconds` is the total duration."""

    format: int
    date: str
    size: str
    seconds: float
    machine: Machine
    runs: list[Run]


class Comparison(Struct, frozen=True):
    """One figure in two runs. `ratio` is new/old, or None if the old value is 0."""

    mode: str
    services: int
    figure: str
    unit: str
    old: float
    new: float
    ratio: float | None
    disjoint: bool
    """Whether the two spreads do not overlap. If they do, the difference may be chance."""


def median(samples: Sequence[float]) -> Spread:
    """Return the median of samples with their range. Raises `ValueError` without samples."""
    return _spread(statistics.median, samples)


def mean(samples: Sequence[float]) -> Spread:
    """Return the mean of samples with their range, for quantities whose resolution is coarser than one sample."""
    return _spread(statistics.fmean, samples)


def exact(value: float) -> Spread:
    """Return the spread of a single sample."""
    return Spread(value, value, value, 1)


def scaled(spread: Spread, factor: float) -> Spread:
    """Convert a spread to another unit."""
    return Spread(spread.value * factor, spread.low * factor, spread.high * factor, spread.samples)


def compare(old: Results, new: Results) -> Iterator[Comparison]:
    """Yield every figure that both results contain for the same mode and size, in the order of the new results."""
    known = {
        (run.mode, run.services, run.endpoints, figure.name, figure.unit): figure.measured
        for run in old.runs
        for figure in run.figures
    }
    for run in new.runs:
        for figure in run.figures:
            before = known.get((run.mode, run.services, run.endpoints, figure.name, figure.unit))
            if before is None:
                continue
            now = figure.measured
            ratio = now.value / before.value if before.value else None
            disjoint = now.low > before.high or now.high < before.low
            yield Comparison(run.mode, run.services, figure.name, figure.unit, before.value, now.value, ratio, disjoint)


def _spread(center: Callable[[Sequence[float]], float], samples: Sequence[float]) -> Spread:
    if not samples:
        raise ValueError("a figure needs at least one sample")
    return Spread(center(samples), min(samples), max(samples), len(samples))
