"""`make bench`: what kproxy costs on the real kernel, beside the floor: the bare `iptables-restore` of the same input.

Absolute times depend on the machine; the ratio in the last column does not. Runs in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

from rich.console import Console
from rich.table import Table

from kproxy.host.nfacct import ensure_counters
from kproxy.host.run import run
from kproxy.iptables.apply import Iptables
from kproxy.iptables.backend import BLOCK_RULES, UNLIMITED, IptablesBackend
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.context import Context
from kproxy.model.delta import Upsert
from kproxy.model.local_traffic import LocalTraffic
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Family
from kproxy.sync.family import FamilySync
from tests.bench import cluster
from tests.lab.namespace import Namespace
from tests.lab.requirements import missing_commands, missing_privilege

CHANGES = 15
FLUSH = "".join(f"*{table}\nCOMMIT\n" for table in ("mangle", "nat", "filter"))


class Recorder(Iptables):
    """The real iptables, with every input kept."""

    def __init__(self) -> None:
        super().__init__(Family.IPV4)
        self.inputs: list[str] = []

    def restore(self, text: str) -> None:
        self.inputs.append(text)
        super().restore(text)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def replay(inputs: list[str]) -> None:
    """Make transactions as bare as they can be made: this is the floor."""
    bare = Iptables(Family.IPV4)
    for text in inputs:
        bare.restore(text)


def empty_kernel() -> None:
    done = run(["iptables-restore"], FLUSH, timeout=600)
    if done.code:
        raise RuntimeError(done.stderr)


def measure(services: int, endpoints: int) -> dict[str, float]:
    """Measure one size in the present namespace and return the figures in seconds and counts."""
    empty_kernel()
    store = cluster.store(services, endpoints)
    kernel = Recorder()
    blocks = BLOCK_RULES if Iptables(Family.IPV4).version().nft else UNLIMITED
    context = Context(
        Family.IPV4, cluster.NODE, local_traffic=LocalTraffic(cidr="10.128.0.0/9"), localhost_node_ports=True
    )
    sync = FamilySync(IptablesBackend(kernel, block_rules=blocks), lambda _: context)
    first = seconds(lambda: sync.sync(store))
    inputs = kernel.inputs
    again = seconds(lambda: FamilySync(IptablesBackend(kernel, block_rules=blocks), lambda _: context).sync(store))
    empty_kernel()
    first_floor = seconds(lambda: replay(inputs))

    changes, floors, rules = [], [], 0
    for turn in range(CHANGES):
        number = turn * services // CHANGES
        took, there = _change(sync, store, kernel, cluster.endpoint_slice(number, endpoints, shift=turn + 1))
        _, back = _change(sync, store, kernel, cluster.endpoint_slice(number, endpoints))
        changes.append(took)
        floors.append(seconds(partial(replay, there)))
        replay(back)
        rules += sum(text.count("\n-A ") for text in there)
    return {
        "services": services,
        "endpoints": services * endpoints,
        "first sync": first,
        "first sync floor": first_floor,
        "restart": again,
        "one endpoint": statistics.median(changes),
        "one endpoint floor": statistics.median(floors),
        "rules per change": rules / CHANGES,
        "peak RSS MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _change(sync: FamilySync, store: Store, kernel: Recorder, found: EndpointSlice) -> tuple[float, list[str]]:
    kernel.inputs = []
    sync.note(store.apply(Upsert(found)))
    return seconds(lambda: sync.sync(store)), kernel.inputs


def show(rows: list[dict[str, float]]) -> None:
    table = Table("services", "endpoints", "measured", "seconds", "floor", "ratio", title="iptables mode, IPv4")
    for row in rows:
        size = (f"{row['services']:,.0f}", f"{row['endpoints']:,.0f}")
        for name in ("first sync", "one endpoint"):
            took, floor = row[name], row[f"{name} floor"]
            table.add_row(*size, name, f"{took:.3f}", f"{floor:.3f}", f"{took / floor:.2f}")
        table.add_row(*size, "restart", f"{row['restart']:.3f}", "", "")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser("make bench")
    parser.add_argument("--services", type=int, nargs="+", default=[100, 1000], help="how many Services")
    parser.add_argument("--endpoints", type=int, default=10, help="how many endpoints each Service has")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if complaint := missing_commands() or missing_privilege():
        sys.exit(complaint)
    node = Namespace(cluster.NODE)
    node.call(lambda: ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER)))
    rows = [node.call(partial(measure, size, options.endpoints)) for size in options.services]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)


if __name__ == "__main__":
    main()
