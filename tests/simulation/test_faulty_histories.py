"""The histories of the unit tests of both backends, with a kernel of which one operation in ten fails."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from random import Random
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.iptables.names import PORT_CHAIN_PREFIXES
from kproxy.model.context import Context
from kproxy.model.delta import Delta
from kproxy.model.types import Family
from kproxy.sync.reconciler import Resync
from tests.fakekernel import FakeKernel
from tests.faketable import FakeTable
from tests.simulation.faults import Faults, faulty_iptables, faulty_table
from tests.simulation.history import no_threads
from tests.unit.strategies import deltas
from tests.unit.test_iptables_incremental import THRESHOLDS, KernelsProxy, from_scratch
from tests.unit.test_nftables_incremental import SIZES, Event, TablesProxy, family_contexts, histories, replay

LATER = 1e6
"""A time at which every quarantined Service is tried again, in seconds."""


def faulty_tables(faults: Faults) -> dict[Family, FakeTable]:
    return {family: cast("FakeTable", faulty_table(FakeTable(family), faults)) for family in Family}


def faulty_kernels(faults: Faults) -> dict[Family, FakeKernel]:
    return {family: cast("FakeKernel", faulty_iptables(FakeKernel(), faults)) for family in Family}


def used_lines(dumps: Mapping[Family, list[str]]) -> dict[Family, list[str]]:
    """Return the lines of the dumps, without those of per-Service chains and shards to which no chain in use jumps."""
    return {family: list(_used_lines(lines)) for family, lines in dumps.items()}


def _used_lines(lines: list[str]) -> Iterator[str]:
    table, rules, chains = "", dict[tuple[str, str], list[str]](), list[tuple[str, str]]()
    for line in lines:
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            chains.append((table, line[1:].split(" ")[0]))
        elif line.startswith("-A "):
            rules.setdefault((table, line.split(" ")[1]), []).append(line)
    waiting = [chain for chain in chains if not chain[1].startswith(PORT_CHAIN_PREFIXES)]
    used: set[tuple[str, str]] = set()
    while waiting:
        chain = waiting.pop()
        if chain not in used:
            used.add(chain)
            targets = (re.search(r" -j (\S+)", line) for line in rules.get(chain, ()))
            waiting += [(chain[0], match[1]) for match in targets if match and (chain[0], match[1]) in chains]
    for chain in chains:
        if chain in used:
            yield from (f":{' '.join(chain)}", *rules.get(chain, ()))


@settings(deadline=None, max_examples=150)
@given(family_contexts(), histories(), st.sampled_from(SIZES), st.integers(0, 1 << 32))
def test_nftables_recovers_from_random_failures(
    contexts: Mapping[Family, Context], history: list[Event], size: int, seed: int
) -> None:
    faults = Faults(Random(seed))
    with no_threads(Random(seed)):
        proxy = replay(TablesProxy(contexts, batch_frontends=size, kernels=faulty_tables(faults)), history)
        faults.stop()
        proxy.settle()
        for sync in proxy.families.values():
            sync.sync(proxy.store, LATER)
        assert proxy.tables() == proxy.tables_of_fresh_start()
        assert proxy.verify()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(deltas(), st.booleans()), max_size=25),
    st.sampled_from((1, 6, 600)),
    st.sampled_from(THRESHOLDS),
    st.integers(0, 1 << 32),
)
def test_iptables_recovers_from_random_failures(
    history: list[tuple[Delta, bool]], max_transaction_rules: int, dispatch_threshold: int, seed: int
) -> None:
    faults = Faults(Random(seed))
    proxy = KernelsProxy(
        max_transaction_rules=max_transaction_rules,
        dispatch_threshold=dispatch_threshold,
        kernels=faulty_kernels(faults),
    )
    for delta, pause in history:
        proxy.apply(delta)
        if pause:
            proxy.sync_after(100)
    faults.stop()
    proxy.settle()
    fresh = from_scratch(proxy.store, dispatch_threshold)
    assert used_lines(proxy.dump()) == used_lines(fresh)
    # The deletion of unused chains is not repeated after a failure until the next full check.
    for sync in proxy.families.values():
        sync.forget()
    proxy.reconciler.apply(Resync())
    proxy.settle()
    assert proxy.dump() == fresh
