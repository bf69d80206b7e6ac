"""After any history of changes, failures and restarts, the table is the one that a fresh start creates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.context import Context
from kproxy.model.delta import BASIC_KINDS, Delete, Delta, Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family, Node, ServiceCIDR
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.elements import SetElement
from kproxy.nftables.ruleset import Goto, rule
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import FamilySync
from tests.faketable import FakeChain, FakeTable, TableState
from tests.inprocess import EMPTY_LISTS, InProcessProxy
from tests.unit.strategies import contested_deltas, contested_services, contexts, serving_slices, weighted

KINDS = (*BASIC_KINDS, ServiceCIDR)
SIZES = (1, 2, 2_000)
"""Maximum numbers of frontends in a batch."""

Contexts: TypeAlias = Mapping[Family, Context]


class TablesProxy(InProcessProxy):
    """Both families of nftables mode on two fake tables."""

    def __init__(
        self,
        contexts: Contexts,
        *,
        batch_frontends: int = 2_000,
        kernels: Mapping[Family, FakeTable] | None = None,
        store: Store | None = None,
    ) -> None:
        self.contexts = contexts
        self.kernels = kernels or {family: FakeTable(family) for family in Family}
        families = {
            family: FamilySync(
                NftablesBackend(kernel, batch_frontends=batch_frontends),
                partial(self._context, family),
                large_cluster_endpoints=math.inf,
            )
            for family, kernel in self.kernels.items()
        }
        super().__init__(families, store=store or Store("node-1", KINDS))
        if store is None:
            self.apply(*EMPTY_LISTS, Replace(ServiceCIDR, ()))

    def _context(self, family: Family, node: Node | None) -> Context:
        return replace(self.contexts[family], zone=node.zone if node else "")

    def try_sync(self) -> None:
        """Sync each family once, even if the kernel rejects the change of the other."""
        for sync in self.families.values():
            with suppress(SyncError):
                sync.sync(self.store)

    def settle(self) -> None:
        """Let the kernel accept everything and sync."""
        for kernel in self.kernels.values():
            kernel.reject = lambda _: None
        self.sync()

    def tables(self) -> dict[Family, TableState | None]:
        return {family: kernel.table for family, kernel in self.kernels.items()}

    def restarted(self, batch_frontends: int) -> TablesProxy:
        """Return a new process on the same tables."""
        return TablesProxy(self.contexts, batch_frontends=batch_frontends, kernels=self.kernels, store=self.store)

    def tables_of_fresh_start(self) -> dict[Family, TableState | None]:
        """Return the tables that a first sync of the same objects creates."""
        fresh = TablesProxy(self.contexts, store=self.store)
        fresh.settle()
        return fresh.tables()


class Reconfigured(Struct, frozen=True):
    """The configuration changes."""

    contexts: dict[Family, Context]


class KernelFails(Struct, frozen=True):
    """The kernel accepts so many more transactions and rejects all later ones."""

    after: int


class OtherTableChanged(Struct, frozen=True):
    """Another process changes another table."""


class Restarted(Struct, frozen=True):
    """kproxy exits, and a new process starts."""

    batch_frontends: int


class Damaged(Struct, frozen=True):
    """kproxy exits; another process deletes and changes elements, flushes chains and adds one; a new kproxy starts."""

    every: int
    offset: int
    batch_frontends: int

    def apply(self, table: TableState) -> None:
        """Damage the objects whose index modulo `every` is `offset`, and change the elements after deleted ones."""
        for fake_set in table.sets.values():
            for index, (key, element) in enumerate(list(fake_set.elements.items())):
                if index % self.every == self.offset:
                    del fake_set.elements[key]
                elif index % self.every == self.offset + 1:
                    fake_set.elements[key] = _changed(element)
        for index, chain in enumerate(table.chains.values()):
            if index % self.every == self.offset:
                chain.rules.clear()
        table.chains["foreign"] = FakeChain(None, "", [rule(Goto("services"))])


def _changed(element: SetElement) -> SetElement:
    if isinstance(element.value, bytes):
        return replace(element, value=bytes(len(element.value)))
    return replace(element, comment="foreign")


class Sync(Struct, frozen=True):
    """kproxy syncs both families."""


Event: TypeAlias = Delta | Reconfigured | KernelFails | OtherTableChanged | Restarted | Damaged | Sync


def family_contexts() -> st.SearchStrategy[dict[Family, Context]]:
    return st.fixed_dictionaries({family: contexts(family) for family in Family})


def events() -> st.SearchStrategy[Event]:
    return weighted(
        (8, contested_deltas()),
        (4, st.just(Sync())),
        (1, st.builds(Reconfigured, family_contexts())),
        (1, st.builds(KernelFails, st.integers(0, 2))),
        (1, st.just(OtherTableChanged())),
        (2, st.builds(Restarted, st.sampled_from(SIZES))),
        (1, st.builds(Damaged, st.integers(2, 4), st.integers(0, 3), st.sampled_from(SIZES))),
    )


def histories(length: int = 8) -> st.SearchStrategy[list[Event]]:
    """Histories that begin with Services and EndpointSlices, so that later events change something."""
    services = st.lists(contested_services(), min_size=2, max_size=3, unique_by=lambda service: service.name)
    slices = st.lists(serving_slices(), min_size=2, max_size=3, unique_by=lambda endpoint_slice: endpoint_slice.name)
    return st.builds(
        lambda *lists, more: [*(Replace(type(objects[0]), tuple(objects)) for objects in lists), *more],
        services,
        slices,
        more=st.lists(events(), min_size=length, max_size=4 * length),
    )


def rejecting(after: int) -> Callable[[Transaction], str | None]:
    """Return a function for `FakeTable.reject` that rejects all transactions but the first `after`."""
    remaining = after

    def reject(transaction: Transaction) -> str | None:
        nonlocal remaining
        remaining -= 1
        return "Cannot allocate memory" if remaining < 0 else None

    return reject


def replay(proxy: TablesProxy, history: Sequence[Event]) -> TablesProxy:
    """Replay a history and return the proxy that runs at its end."""
    for event in history:
        for kernel in proxy.kernels.values():
            replay_in_kernel(kernel, event)
        match event:
            case Reconfigured():
                proxy.contexts = event.contexts
            case Restarted() | Damaged():
                proxy = proxy.restarted(event.batch_frontends)
            case Sync():
                proxy.try_sync()
            case Upsert() | Delete() | Replace():
                proxy.apply(event)
    return proxy


def replay_in_kernel(kernel: FakeTable, event: Event) -> None:
    """Apply an event to one family's table, if it concerns the kernel."""
    match event:
        case KernelFails():
            kernel.reject = rejecting(event.after)
        case OtherTableChanged():
            kernel.increment_generation()
        case Damaged() if kernel.table is not None:
            event.apply(kernel.table)


@settings(deadline=None, max_examples=300)
@given(family_contexts(), histories(), st.sampled_from(SIZES))
def test_any_history_leaves_the_table_of_a_fresh_start(contexts: Contexts, history: list[Event], size: int) -> None:
    proxy = replay(TablesProxy(contexts, batch_frontends=size), history)
    proxy.settle()
    assert proxy.tables() == proxy.tables_of_fresh_start()
    assert proxy.verify()
