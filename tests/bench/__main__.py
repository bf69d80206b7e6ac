"""`make bench`: what kproxy costs on the real kernel, beside the floor of each figure in the same run.

Absolute times depend on the machine, ratios hardly. Everything runs in network namespaces of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from kproxy.host.commands import CommandError
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.types import Family
from tests.bench import baselines, measurements
from tests.bench.catalog import figures, with_memory_floors
from tests.bench.chart import chart
from tests.bench.cluster import Cluster
from tests.bench.figures import FORMAT, Results, Run, compare
from tests.bench.machine import machine
from tests.bench.report import show, show_comparison
from tests.bench.sizes import MODES, SIZES, Task
from tests.bench.testbed import SERVED, Scene
from tests.lab.requirements import missing_commands, missing_privilege

LEAST_SERVICES = 20
"""Fewer do not suffice for the changes that are measured."""


def run_task(task: Task, endpoints: int, folder: Path) -> Run:
    """Measure one mode and size of cluster, then its floors. Raises `RuntimeError` if those are of something else."""
    cluster = Cluster(task.services, endpoints, SERVED)
    with Scene(task.mode, cluster, folder) as scene:
        done = measurements.take_all(scene, task.effort)
    floor, kernel = baselines.take_all(task.mode, cluster, task.effort, rolling_syncs=done.rolling_syncs)
    if kernel != done.kernel:
        raise RuntimeError(f"the floor is of another state: the kernel held {kernel}, under kproxy {done.kernel}")
    return Run(task.mode, task.services, endpoints, figures(done.found, floor | done.direct))


def run_all(size: str, tasks: Sequence[Task], endpoints: int, console: Console) -> Results:
    """Carry out all tasks, telling which one is under way."""
    facts = machine()
    began = time.monotonic()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    runs = []
    with tempfile.TemporaryDirectory(prefix="kproxy-bench-") as folder:
        for place, task in enumerate(tasks, 1):
            console.print(f"{place}/{len(tasks)}: {task.mode} mode, {task.services:,} Services x {endpoints} endpoints")
            runs.append(run_task(task, endpoints, Path(folder)))
    return Results(FORMAT, date, size, round(time.monotonic() - began, 1), facts, with_memory_floors(runs))


def read(path: str) -> Results:
    """Return the results in a file. Ends the program if it holds none."""
    try:
        found = msgspec.json.decode(Path(path).read_bytes(), type=Results)
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"{path}: {error}")
    if found.format != FORMAT:
        sys.exit(f"{path}: format {found.format}, but figures of format {FORMAT} mean something else")
    return found


def cannot_run() -> str:
    """Return one line that says why the benchmark cannot run here, or ""."""
    if complaint := missing_commands() or missing_privilege():
        return complaint
    try:
        version = IptablesRunner(Family.IPV4).version()
    except CommandError as error:
        return str(error)
    return "" if version.nft else f"{version}: only an iptables that speaks to nf_tables gives notice of its commits"


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser("make bench", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="medium", help="how much is measured (medium)")
    parser.add_argument("--modes", default=",".join(MODES), help="iptables, nftables or both, with a comma between")
    parser.add_argument(
        "--services", type=int, nargs="+", default=[], help="sizes of cluster, instead of those of SIZE"
    )
    parser.add_argument("--endpoints", type=int, default=10, help="how many endpoints each Service has (10)")
    parser.add_argument("--json", default="build/bench.json", help="where to write the results (build/bench.json)")
    parser.add_argument("--chart", default="build/bench.svg", help="where to draw them (build/bench.svg)")
    parser.add_argument("--read", metavar="FILE", help="show earlier results again instead of measuring")
    parser.add_argument("--compare", metavar="FILE", help="earlier results to compare with")
    found = parser.parse_args()
    found.modes = found.modes.split(",")
    if unknown := set(found.modes) - set(MODES):
        parser.error(f"--modes: {', '.join(sorted(unknown))}: there are {' and '.join(MODES)}")
    if too_small := [count for count in found.services if count < LEAST_SERVICES]:
        parser.error(f"--services: {too_small[0]}: at least {LEAST_SERVICES} (one Service comes first anyway)")
    if not 1 <= found.endpoints <= len(SERVED):
        parser.error(f"--endpoints: {found.endpoints}: from 1 to {len(SERVED)}")
    return found


def write(path: str, content: bytes) -> None:
    """Write a file, and its folder if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def main() -> None:
    """Run the benchmark, or show an earlier one."""
    options, console = arguments(), Console()
    old = read(options.compare) if options.compare else None
    if options.read:
        results = read(options.read)
    else:
        if complaint := cannot_run():
            sys.exit(complaint)
        tasks = list(SIZES[options.size].tasks(options.modes, options.services))
        results = run_all(options.size, tasks, options.endpoints, console)
        write(options.json, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    show(results, console)
    write(options.chart, chart(results).encode())
    if old:
        show_comparison(compare(old, results), console)
    console.print(f"{options.read or options.json}, {options.chart}; measured in {results.seconds:.0f} s")


if __name__ == "__main__":
    main()
