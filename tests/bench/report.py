"""Results and comparisons as tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.bench.figures import Comparison, Machine, Results, Run, Spread

QUIET_LOAD = 0.3
"""Load average per CPU above which other processes affect the times."""


def number(value: float) -> str:
    """Format a number with three significant digits."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1 or not size:
        return f"{value:.3g}"
    return f"{value:.3f}"


def show(results: Results, console: Console) -> None:
    """Print the machine, then one table per run."""
    console.print(_machine_line(results.machine))
    if results.machine.load > QUIET_LOAD * results.machine.cpus:
        console.print(f"[yellow]The machine was busy (load average {results.machine.load}): the times are unreliable.")
    for run in results.runs:
        console.print(_table(run))


def show_comparison(comparisons: Iterable[Comparison], console: Console) -> None:
    """Print the figures of two runs and the ratios new/old."""
    table = _columns("new / old", "mode", "services", "figure", "unit")
    for name in ("old", "new", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in comparisons:
        ratio = f"{each.ratio:.2f}" if each.ratio is not None else ""
        remark = "" if each.disjoint else "within the spread"
        size = f"{each.services:,}"
        table.add_row(each.mode, size, each.figure, each.unit, number(each.old), number(each.new), ratio, remark)
    console.print(table)


def _machine_line(machine: Machine) -> str:
    return (
        f"Linux {machine.kernel}, {machine.cpus} CPUs ({machine.cpu or 'unknown'}), {machine.memory} GB, "
        f"Python {machine.python}, iptables {machine.iptables}, "
        f"kproxy {machine.kproxy} (commit {machine.commit or 'unknown'})"
    )


def _table(run: Run) -> Table:
    plural = "" if run.services == 1 else "s"
    title = f"{run.mode} mode, {run.services:,} Service{plural} with {run.endpoints} endpoints each"
    table = _columns(title, "figure", "unit")
    for name in ("kproxy", "spread", "baseline", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("baseline is", no_wrap=True)
    for figure in run.figures:
        ratio = number(figure.ratio) if figure.ratio is not None else ""
        baseline = number(figure.baseline.value) if figure.baseline else ""
        value = number(figure.measured.value)
        table.add_row(figure.name, figure.unit, value, spread(figure.measured), baseline, ratio, figure.baseline_is)
    return table


def _columns(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def spread(measured: Spread) -> str:
    """Return the distance of the minimum and the maximum from the figure in percent; "" for a single sample."""
    if measured.samples == 1 or not measured.value:
        return ""
    return f"{100 * (measured.low / measured.value - 1):+.0f}% {100 * (measured.high / measured.value - 1):+.0f}%"
