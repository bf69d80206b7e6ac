"""Results and comparisons as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.bench.figures import Comparison, Machine, Results, Run, Spread

QUIET_LOAD = 0.3
"""Load average per CPU from which on others had a part in the times."""


def number(value: float) -> str:
    """Return a figure with three digits that mean something."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1 or not size:
        return f"{value:.3g}"
    return f"{value:.3f}"


def show(results: Results, console: Console) -> None:
    """Print one table for each run, the machine before them."""
    console.print(_machine_line(results.machine))
    if results.machine.load > QUIET_LOAD * results.machine.cpus:
        console.print(
            f"[yellow]The machine was busy (load {results.machine.load}): take the times with a grain of salt."
        )
    for run in results.runs:
        console.print(_table(run))


def show_comparison(found: Iterable[Comparison], console: Console) -> None:
    """Print the figures of two runs and the ratios new/old."""
    table = _columns("new / old", "mode", "services", "figure", "unit")
    for name in ("old", "new", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("")
    for each in found:
        ratio = f"{each.ratio:.2f}" if each.ratio is not None else ""
        remark = "" if each.apart else "within the spread"
        size = f"{each.services:,}"
        table.add_row(each.mode, size, each.figure, each.unit, number(each.old), number(each.new), ratio, remark)
    console.print(table)


def _machine_line(machine: Machine) -> str:
    return (
        f"Linux {machine.kernel}, {machine.cpus} CPUs ({machine.cpu or 'unknown'}), {machine.memory} GB, "
        f"Python {machine.python}, iptables {machine.iptables}, "
        f"kproxy {machine.kproxy} ({machine.commit or 'no commit'})"
    )


def _table(run: Run) -> Table:
    title = f"{run.mode} mode, Services: {run.services:,} of {run.endpoints} endpoints"
    table = _columns(title, "figure", "unit")
    for name in ("kproxy", "spread", "floor", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("floor is", no_wrap=True)
    for figure in run.figures:
        ratio = number(figure.ratio) if figure.ratio is not None else ""
        floor = number(figure.floor.value) if figure.floor else ""
        value = number(figure.found.value)
        table.add_row(figure.name, figure.unit, value, spread(figure.found), floor, ratio, figure.floor_is)
    return table


def _columns(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def spread(found: Spread) -> str:
    """Return how far the least and the greatest sample are from the figure, in percent of it; "" for one sample."""
    if found.samples == 1 or not found.value:
        return ""
    return f"{100 * (found.low / found.value - 1):+.0f}% {100 * (found.high / found.value - 1):+.0f}%"
