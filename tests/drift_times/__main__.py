"""Measure how long kproxy takes to repair its rules, for every kind of damage, and print median, p99 and failures.

Everything runs in temporary network namespaces. Needs root.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kproxy.model.types import Family
from tests.bench.commit_monitor import CommitMonitor
from tests.drift_times.damages import damages
from tests.drift_times.measure import Measurement, Repair
from tests.drift_times.testbed import DamagedNode
from tests.lab.requirements import missing_commands, missing_privilege

MODES = ("nftables", "iptables-nft", "iptables-legacy")
MEDIAN_SECONDS, P99_SECONDS = 1.0, 2.0


def measure(mode: str, services: int, families: Sequence[Family], only: str, patience: float) -> list[Repair]:
    """Measure all kinds of damage in one mode, or those whose name contains `only`."""
    chosen = [each for each in damages(mode) if only in each.name]
    folder = Path(tempfile.mkdtemp(prefix="kproxy-repair-times-"))
    print(f"{mode}: {services:,} Services, {len(chosen)} kinds of damage in each family; log: {folder}/kproxy.log")
    with DamagedNode(mode, services, folder) as testbed, CommitMonitor(testbed.node) as monitor:
        testbed.start()
        measurement = Measurement(testbed, monitor, patience=patience)
        return [repair for family in families for repair in measurement.run(chosen, family)]


def summary(mode: str, repairs: Sequence[Repair]) -> tuple[str, bool]:
    """Return a line with the figures of one mode, and whether they are within the limits."""
    times = sorted(repair.seconds for repair in repairs if repair.seconds is not None)
    never = len(repairs) - len(times)
    if not times:
        return f"{mode}: {len(repairs)} damages, none repaired", not repairs
    median, p99 = statistics.median(times), times[math.ceil(len(times) * 0.99) - 1]
    figures = f"median {median:.3f} s, p99 {p99:.3f} s, maximum {times[-1]:.3f} s, never {never}"
    text = f"{mode}: {len(repairs)} damages, {figures}"
    return text, median < MEDIAN_SECONDS and p99 < P99_SECONDS and not never


def main() -> None:
    """Run the measurement. The exit code is 1 if a figure is outside its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.drift_times", description=__doc__)
    parser.add_argument("--mode", choices=(*MODES, "all"), default="all")
    parser.add_argument("--services", type=int, default=10, help="number of Services, at least 10 (default: 10)")
    parser.add_argument("--family", choices=("4", "6", "both"), default="both")
    parser.add_argument("--only", default="", help="only damages whose name contains this text")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds until a damage counts as never repaired")
    options = parser.parse_args()
    if problem := missing_commands() or missing_privilege():
        sys.exit(problem)
    families = {"4": [Family.IPV4], "6": [Family.IPV6], "both": list(Family)}[options.family]
    lines = []
    for mode in MODES if options.mode == "all" else (options.mode,):
        repairs = measure(mode, max(10, options.services), families, options.only, options.patience)
        lines.append(summary(mode, repairs))
    for text, _ in lines:
        print(text)
    sys.exit(0 if all(good for _, good in lines) else 1)


if __name__ == "__main__":
    main()
