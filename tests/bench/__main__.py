"""Measure what kproxy costs on the real kernel, and a baseline for each figure in the same run.

Absolute times depend on the machine; compare machines by the ratios. Everything runs in temporary network namespaces.
"""

from __future__ import annotations

import argparse
import compileall
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
from msgspec.structs import replace
from rich.console import Console

import kproxy
from kproxy.host.commands import CommandError
from kproxy.iptables.runner import IptablesRunner
from kproxy.kube.client.cluster_access import ClientError
from kproxy.kube.client.response import TransportError
from kproxy.model.types import Family
from tests.bench.api_server import BenchApiServer
from tests.bench.baselines import measure_baselines
from tests.bench.beside import PATIENCE, PLACEHOLDERS, Proxy, measure_beside, other_proxy
from tests.bench.catalog import figures, with_memory_baselines
from tests.bench.chart import SHOWN, SUMMARY, chart
from tests.bench.cluster import MAX_ENDPOINTS, Cluster
from tests.bench.figures import FORMAT, Results, Run, compare
from tests.bench.machine import machine
from tests.bench.measurements import measure_daemon
from tests.bench.real_api_server import RealApiServer
from tests.bench.report import show, show_comparison
from tests.bench.sizes import MODES, SIZES, Task
from tests.bench.testbed import MAX_SERVICE_ENDPOINTS, Testbed, server_addresses
from tests.bench.throughput import missing as missing_iperf
from tests.lab.requirements import missing_commands, missing_privilege

PLAIN_WIDTH = 100
"""Columns of the output if it does not go to a terminal."""

MIN_SERVICES = 20
"""Smaller clusters have too few Services for the measured changes."""


def run_task(task: Task, folder: Path) -> Run:
    """Measure the daemon for one mode and cluster size, then the baselines.

    Raises `RuntimeError` if the baselines did not create the same kernel objects as the daemon.
    """
    cluster = Cluster(task.services, task.endpoints, server_addresses(task.endpoints))
    with Testbed(task.mode, cluster, folder) as testbed:
        daemon = measure_daemon(testbed, task.repetitions)
    samples, kernel = measure_baselines(task.mode, cluster, task.repetitions, rolling_syncs=daemon.rolling_syncs)
    if kernel != daemon.kernel:
        raise RuntimeError(f"the baseline created {kernel}, but the daemon created {daemon.kernel}")
    return Run(task.mode, task.services, task.endpoints, figures(daemon.samples, samples | daemon.direct))


def run_beside(task: Task, folder: Path, *, other: Proxy | None, kubeconfig: str | None, patience: float) -> Run:
    """Measure kproxy, beside another proxy if given, for one mode and cluster size.

    With a kubeconfig, the API server is a real one. Its objects cannot change all at once, so there are no bursts.
    """
    cluster = Cluster(task.services, task.endpoints, server_addresses(task.endpoints))
    repetitions = replace(task.repetitions, bursts=0) if kubeconfig else task.repetitions
    api_server = partial(RealApiServer, kubeconfig) if kubeconfig else BenchApiServer
    with Testbed(task.mode, cluster, folder, api_server) as testbed:
        measured = measure_beside(testbed, other, repetitions, patience)
    return Run(task.mode, task.services, task.endpoints, measured)


def run_all(size: str, tasks: Sequence[Task], run: Callable[[Task, Path], Run], console: Console) -> Results:
    """Run all tasks with `run` and print the progress."""
    facts = machine()
    # As in an installed kproxy. With PYTHONDONTWRITEBYTECODE, every daemon would compile a changed checkout again.
    compileall.compile_dir(Path(kproxy.__file__).parent, quiet=1)
    start = time.monotonic()
    date = datetime.now(UTC).isoformat(timespec="seconds")
    runs = []
    with tempfile.TemporaryDirectory(prefix="kproxy-bench-") as folder:
        for number, task in enumerate(tasks, 1):
            progress = f"{number}/{len(tasks)}: {task.mode} mode"
            console.print(f"{progress}, {task.services:,} Services with {task.endpoints} endpoints each")
            runs.append(run(task, Path(folder)))
    return Results(FORMAT, date, size, round(time.monotonic() - start, 1), facts, runs)


def measure(options: argparse.Namespace, console: Console) -> Results:
    """Run the benchmark that the options select. Exits with a message if a proxy fails."""
    if options.other is None and not options.kubeconfig:
        results = run_all(options.size, options.tasks, run_task, console)
        return replace(results, runs=with_memory_baselines(results.runs))
    run = partial(run_beside, other=options.other, kubeconfig=options.kubeconfig, patience=options.patience)
    try:
        return run_all(options.size, options.tasks, run, console)
    except (RuntimeError, TimeoutError, ClientError, TransportError) as error:
        sys.exit(f"{'--beside' if options.other else '--kubeconfig'}: {error}")


def read(path: str) -> Results:
    """Read results from a file. Exits with a message if the file is invalid."""
    try:
        results = msgspec.json.decode(Path(path).read_bytes(), type=Results)
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"{path}: {error}")
    if results.format != FORMAT:
        sys.exit(f"{path}: format {results.format} is not supported, expected format {FORMAT}")
    return results


def cannot_run() -> str:
    """Return the reason why the benchmark cannot run on this machine, or ""."""
    if problem := missing_commands() or missing_iperf() or missing_privilege():
        return problem
    try:
        version = IptablesRunner(Family.IPV4).version()
    except CommandError as error:
        return str(error)
    return (
        "" if version.nft else f"{version}: the benchmark requires iptables-nft, because only nf_tables reports commits"
    )


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser("make bench", description=__doc__)
    parser.add_argument(
        "--size", choices=SIZES, default="medium", help="cluster sizes and repetitions (default: medium)"
    )
    parser.add_argument(
        "--modes", default=",".join(MODES), help="comma-separated proxy modes (default: iptables,nftables)"
    )
    parser.add_argument(
        "--services", type=int, nargs="+", default=[], help="numbers of Services to measure instead of those of --size"
    )
    parser.add_argument(
        "--endpoints", type=int, default=0, help="number of endpoints of each Service (default: that of --size)"
    )
    parser.add_argument(
        "--json", default="build/bench.json", help="output file for the results (default: build/bench.json)"
    )
    parser.add_argument(
        "--chart", default="build/bench.svg", help="output file for the chart (default: build/bench.svg)"
    )
    parser.add_argument(
        "--beside",
        metavar="COMMAND",
        help="measure another service proxy too, in turn with kproxy, and compare the two. The command may contain "
        + ", ".join(f"{{{name}}}" for name in PLACEHOLDERS),
    )
    parser.add_argument(
        "--kubeconfig",
        metavar="FILE",
        help="use the API server of this kubeconfig: creates a Namespace with Services and EndpointSlices and a Node "
        "there, and deletes them at the end. For test clusters only",
    )
    parser.add_argument(
        "--patience",
        metavar="SECONDS",
        type=float,
        default=PATIENCE,
        help="with --beside or --kubeconfig: idle seconds without the expected commits that are an error (default: 60)",
    )
    parser.add_argument("--summary", action="store_true", help="draw only the figures of the chart in the README")
    parser.add_argument("--read", metavar="FILE", help="show earlier results instead of measuring")
    parser.add_argument("--compare", metavar="FILE", help="compare with earlier results")
    options = parser.parse_args()
    options.modes = options.modes.split(",")
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"--modes: unknown mode {', '.join(sorted(unknown))}: choose from {', '.join(MODES)}")
    if too_small := [count for count in options.services if count < MIN_SERVICES]:
        parser.error(f"--services: {too_small[0]}: must be at least {MIN_SERVICES} (1 is always measured)")
    if options.endpoints and not 1 <= options.endpoints <= MAX_SERVICE_ENDPOINTS:
        parser.error(f"--endpoints: {options.endpoints}: must be between 1 and {MAX_SERVICE_ENDPOINTS}")
    try:
        options.other = other_proxy(options.beside) if options.beside is not None else None
    except ValueError as error:
        parser.error(f"--beside: {error}")
    options.tasks = list(SIZES[options.size].tasks(options.modes, options.services, options.endpoints))
    if too_large := [each for each in options.tasks if each.services * each.endpoints > MAX_ENDPOINTS]:
        parser.error(f"{too_large[0].services} Services: must have at most {MAX_ENDPOINTS} endpoints in total")
    return options


def write(path: str, content: bytes) -> None:
    """Write a file; create its directory if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def main() -> None:
    """Run the benchmark, or show earlier results."""
    options, console = arguments(), Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    old = read(options.compare) if options.compare else None
    if options.read:
        results = read(options.read)
    else:
        if problem := cannot_run():
            sys.exit(problem)
        results = measure(options, console)
        write(options.json, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    show(results, console)
    write(options.chart, chart(results, SUMMARY if options.summary else SHOWN).encode())
    if old:
        show_comparison(compare(old, results), console)
    console.print(f"{options.read or options.json}, {options.chart}; the measurement took {results.seconds:.0f} s")


if __name__ == "__main__":
    main()
