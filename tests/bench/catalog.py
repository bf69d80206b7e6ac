"""Every figure of the benchmark: its name, unit and baseline, and how samples are summarized. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from tests.bench.figures import Figure, Run, Spread, mean, median, scaled

Samples: TypeAlias = Mapping[str, Sequence[float]]
"""Samples by the name of their figure. Times are in seconds."""

BARE = "bare"
"""Baseline: the bare transactions, replayed to the kernel."""

APART = "25 apart"
"""Baseline: the same rules in blocks of 25 Services, with one program start per block."""

ONE_SERVICE = "1 Service"
"""Baseline: the same mode with one Service."""

DIRECT = "no rules"
"""Baseline: connections to pods on a node without rules."""

PARSER = "parser"
"""Baseline: a parser that finds the end of the JSON and decodes nothing."""


class Definition(Struct, frozen=True):
    """The definition of a figure. `factor` converts its samples to its unit.

    `baseline_is` is "" for figures without a baseline, `mode` is "" for figures of both modes.
    """

    name: str
    unit: str
    factor: float = 1.0
    summarize: Callable[[Sequence[float]], Spread] = median
    baseline_is: str = ""
    more_is_better: bool = False
    mode: str = ""

    def figure(self, samples: Sequence[float], baseline: Sequence[float]) -> Figure:
        """Return the figure. `baseline` contains samples too; it is empty if the baseline was not measured."""
        return Figure(
            self.name,
            self.unit,
            scaled(self.summarize(samples), self.factor),
            scaled(self.summarize(baseline), self.factor) if baseline else None,
            self.baseline_is if baseline else "",
            self.more_is_better,
        )


def _time_and_cpu(name: str) -> Iterator[Definition]:
    yield Definition(name, "ms", 1e3, baseline_is=BARE)
    yield Definition(f"{name}: CPU", "ms", 1e3, mean, BARE)


def _event(encoding: str) -> Iterator[Definition]:
    yield Definition(f"event, {encoding}: bytes", "B")
    yield Definition(f"event, {encoding}: CPU", "us", 1e6, mean, PARSER)


CATALOG = (
    Definition("first sync", "s", baseline_is=BARE),
    Definition("first sync: in blocks", "s", baseline_is=APART, mode="iptables"),
    Definition("first sync: CPU", "s", baseline_is=BARE),
    Definition("restart: CPU", "s"),
    *_time_and_cpu("one endpoint"),
    *_time_and_cpu("new Service"),
    *_time_and_cpu("deleted Service"),
    Definition("rolling update", "ms", 1e3, baseline_is=BARE),
    Definition("rolling update: CPU/change", "ms", 1e3, mean, BARE),
    Definition("burst", "ms", 1e3, baseline_is=BARE),
    Definition("burst: CPU/change", "ms", 1e3, mean, BARE),
    Definition("burst: commits", ""),
    *_event("JSON"),
    *_event("protobuf"),
    Definition("RSS after first sync", "MB", baseline_is=ONE_SERVICE),
    Definition("RSS after changes", "MB", baseline_is=ONE_SERVICE),
    Definition("RSS at peak", "MB", baseline_is=ONE_SERVICE),
    Definition("kernel: chains", "", baseline_is=BARE),
    Definition("kernel: rules", "", baseline_is=BARE),
    Definition("kernel: sets", "", baseline_is=BARE),
    Definition("kernel: elements", "", baseline_is=BARE),
    Definition("connect to a VIP: median", "us", 1e6, baseline_is=DIRECT),
    Definition("connect to a VIP: p99", "us", 1e6, baseline_is=DIRECT),
    Definition("connections to VIPs", "1/s", baseline_is=DIRECT, more_is_better=True),
    Definition("throughput to a VIP", "Gb/s", 1e-9, baseline_is=DIRECT, more_is_better=True),
    Definition("connect past the rules", "us", 1e6, baseline_is=DIRECT),
)
"""In the order of the table. Connections "past the rules" go directly to a pod: they traverse the rules, but no rule
matches them."""

NAMES = tuple(each.name for each in CATALOG)


def figures(measured: Samples, baselines: Samples) -> list[Figure]:
    """Return all figures that have samples. Raises `KeyError` for a name that is not in the catalog."""
    unknown = {*measured, *baselines} - set(NAMES)
    if unknown:
        raise KeyError(f"unknown figure: {', '.join(sorted(unknown))}")
    return [
        each.figure(measured[each.name], baselines.get(each.name, ())) for each in CATALOG if measured.get(each.name)
    ]


def with_memory_baselines(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with the memory of the smallest run of the same mode as the baseline for memory."""
    smallest = {run.mode: run for run in sorted(runs, key=lambda run: -run.services)}
    return [replace(run, figures=[_with_baseline(each, smallest[run.mode]) for each in run.figures]) for run in runs]


def _with_baseline(figure: Figure, smallest: Run) -> Figure:
    if not figure.name.startswith("RSS"):
        return figure
    memory = {each.name: each.measured for each in smallest.figures}
    baseline = memory.get(figure.name) or memory.get("RSS after first sync")
    return replace(figure, baseline=baseline, baseline_is=ONE_SERVICE)
