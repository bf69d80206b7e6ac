"""Values of metrics that the daemon counts itself: counters, gauges and histograms.

The daemon updates them all the time, but only a scrape renders them. They therefore do not depend on prometheus-client,
which takes 2 MB of memory. All methods are thread-safe.

A metric has one series for each combination of the values of its labels. A series exists from its first update on; a
metric without labels has its only series from the start.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

LabelValues: TypeAlias = tuple[str, ...]
"""The values of a metric's labels, in the order of the labels."""


class _Numbers:
    """A metric with one number per series."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, tuple(labels)
        self._lock = threading.Lock()
        self._values: dict[LabelValues, float] = {} if labels else {(): 0.0}

    def values(self) -> Mapping[LabelValues, float]:
        """Return the current number of each series."""
        with self._lock:
            return dict(self._values)


class Counter(_Numbers):
    """A metric that only increases. Its name ends with `_total`."""

    def add(self, amount: float, *labels: str) -> None:
        """Increase the series with these label values. The amount 0 only creates it."""
        with self._lock:
            self._values[labels] = self._values.get(labels, 0.0) + amount


class Gauge(_Numbers):
    """A metric that is set to a number."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, text, labels)
        self.read: Callable[[], float] | None = None
        """Returns the number at each scrape, if it is not set by `set`; only for metrics without labels."""

    def set(self, value: float, *labels: str) -> None:
        """Set the series with these label values."""
        with self._lock:
            self._values[labels] = value

    def values(self) -> Mapping[LabelValues, float]:
        """Return the current number of each series."""
        return super().values() if self.read is None else {(): self.read()}


class Series:
    """The observations of a histogram with the same label values.

    `counts` has the number of observations by bucket, not cumulated, and finally those above the last bound.
    """

    __slots__ = ("counts", "total")

    def __init__(self, counts: list[int], total: float) -> None:
        self.counts, self.total = counts, total


class Histogram:
    """A metric that counts observations by size. `bounds` are the inclusive upper bounds of its buckets, ascending."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Iterable[float]) -> None:
        self.name, self.text, self.labels, self.bounds = name, text, tuple(labels), tuple(bounds)
        self._lock = threading.Lock()
        self._series: dict[LabelValues, Series] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Count an observation in the series with these label values."""
        bucket = bisect_left(self.bounds, value)
        with self._lock:
            series = self._series.get(labels)
            if series is None:
                series = self._series[labels] = Series([0] * (len(self.bounds) + 1), 0.0)
            series.counts[bucket] += 1
            series.total += value

    def values(self) -> Mapping[LabelValues, Series]:
        """Return a copy of all series."""
        with self._lock:
            return {labels: Series(series.counts.copy(), series.total) for labels, series in self._series.items()}
