"""Print what kproxy costs the API servers of a large cluster: requests and bytes, and how its clients reconnect.

The costs are measured with the real client on loopback, the totals computed. Needs no root and changes nothing.
"""

from __future__ import annotations

import argparse

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.api_cost.measure import Costs, measure
from tests.api_cost.model import HOUR, LOADS, rows
from tests.api_cost.storm import KINDS, SCENARIOS, histogram, simulate
from tests.bench.cluster import Cluster

WIDTH = 120


def main() -> None:
    """Measure, compute, simulate, and print everything."""
    parser = argparse.ArgumentParser("python -m tests.api_cost", description=__doc__)
    parser.add_argument("--nodes", type=int, default=5000, help="number of nodes (default: 5000)")
    parser.add_argument("--services", type=int, default=1000, help="number of Services (default: 1000)")
    parser.add_argument("--endpoints", type=int, default=10, help="number of endpoints of each (default: 10)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the simulations (default: 1)")
    options = parser.parse_args()
    console = Console(highlight=False, width=WIDTH)
    cluster = Cluster(options.services, options.endpoints)
    costs = [measure(cluster, encoding) for encoding in ("protobuf", "JSON")]
    console.print(_measured(costs))
    console.print(_starts(costs, options.nodes))
    console.print(_hourly(costs, options.nodes))
    for scenario in SCENARIOS:
        storm = simulate(scenario, nodes=options.nodes, seed=options.seed)
        console.print(f"\n{scenario.name}: {storm.clients:,} watches of {options.nodes:,} nodes")
        console.print(
            f"complete lists: {storm.lists}; busiest second: {storm.peak:,} accepted requests, "
            f"{storm.share:.1%} of all; all watches resumed after {storm.recovered:.1f} s"
        )
        console.print("second, requests, accepted:")
        for line in histogram(storm):
            console.print(line, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def _measured(costs: list[Costs]) -> Table:
    table = _table("bytes, measured", "", *(each.encoding for each in costs))
    for label, values in (
        ("event of a Service", [each.service for each in costs]),
        ("event of an EndpointSlice", [each.endpoint_slice for each in costs]),
        ("event of the Node", [each.node for each in costs]),
        (f"bookmarks, one of each of {len(KINDS)} kinds", [each.bookmarks for each in costs]),
        ("request for a watch, with response headers", [each.reconnect for each in costs]),
    ):
        table.add_row(label, *(f"{value:,.0f}" for value in values))
    return table


def _starts(costs: list[Costs], nodes: int) -> Table:
    table = _table(f"start of kproxy, and of {nodes:,} at once", "lists", "requests", "MB", f"GB of {nodes:,} nodes")
    starts = [(f"watch list, {each.encoding}", each.watch_list) for each in costs]
    starts.append(("pages of 500, JSON with gzip", costs[0].pages))
    for label, start in starts:
        table.add_row(label, f"{start.requests}", f"{start.bytes / 1e6:.2f}", f"{start.bytes * nodes / 1e9:.2f}")
    return table


def _hourly(costs: list[Costs], nodes: int) -> Table:
    table = _table(
        f"per node and hour, and {nodes:,} nodes together",
        "cluster",
        "requests",
        "kB",
        "of which events",
        "bookmarks",
        "reconnects",
        "requests/s of all",
        "Mbit/s of all",
    )
    for each in costs:
        for row in rows(each):
            table.add_row(
                f"{row.load}, {row.encoding}",
                f"{row.requests:.0f}",
                *(f"{value / 1e3:,.0f}" for value in (row.bytes, row.events, row.bookmarks, row.reconnects)),
                f"{row.requests * nodes / HOUR:.1f}",
                f"{row.bytes * nodes * 8 / HOUR / 1e6:,.1f}",
            )
    described = "; ".join(
        f"{load.name}: {load.endpoint_slices:,} EndpointSlices, {load.services:,} Services, {load.node} times its Node"
        for load in LOADS
    )
    table.caption = f"changes per hour: {described}"
    table.caption_justify = "left"
    return table


if __name__ == "__main__":
    main()
