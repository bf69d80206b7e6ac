"""Whatever happened on the way, a table ends up as a start from the final objects would make it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from kproxy.sync.family import FamilySync
from tests.faketable import FakeChain, FakeTable, TableState
from tests.inprocess import EMPTY_LISTS, InProcessProxy
from tests.unit.strategies import contested_deltas, contested_services, contexts, serving_slices, weighted

KINDS = (*BASIC_KINDS, ServiceCIDR)
SIZES = (1, 2, 2_000)

Contexts: TypeAlias = Mapping[Family, Context]


class TablesProxy(InProcessProxy):
    """Both families of nftables mode on two tables in memory."""

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
                self._maker(family),
                large_cluster_endpoints=math.inf,
            )
            for family, kernel in self.kernels.items()
        }
        super().__init__(families, store=store or Store("node-1", KINDS))
        if store is None:
            self.apply(*EMPTY_LISTS, Replace(ServiceCIDR, ()))

    def _maker(self, family: Family) -> Callable[[Node | None], Context]:
        return lambda node: replace(self.contexts[family], zone=node.zone if node else "")

    def try_sync(self) -> None:
        """Sync each family once, whether or not the kernel accepts the change."""
        for sync in self.families.values():
            with suppress(SyncError):
                sync.sync(self.store)

    def settle(self) -> None:
        for kernel in self.kernels.values():
            kernel.refuse = lambda _: None
        self.sync()

    def tables(self) -> dict[Family, TableState | None]:
        return {family: kernel.table for family, kernel in self.kernels.items()}

    def restarted(self, batch_frontends: int) -> TablesProxy:
        return TablesProxy(self.contexts, batch_frontends=batch_frontends, kernels=self.kernels, store=self.store)

    def fresh(self) -> TablesProxy:
        found = TablesProxy(self.contexts, store=self.store)
        found.settle()
        return found


class Configured(Struct, frozen=True):
    """The configuration is another now."""

    contexts: dict[Family, Context]


class Refuses(Struct, frozen=True):
    """From now on the kernel takes so many transactions, and refuses those after them."""

    after: int


class Foreign(Struct, frozen=True):
    """Somebody makes a change to another table."""


class Restarted(Struct, frozen=True):
    """The process ends, and the next one knows nothing."""

    batch_frontends: int


class Damaged(Struct, frozen=True):
    """While no process runs, others delete or change some elements, flush some chains and add a chain of their own."""

    every: int
    offset: int
    batch_frontends: int

    def apply(self, table: TableState) -> None:
        """Do so."""
        for found in table.sets.values():
            for place, (key, element) in enumerate(list(found.elements.items())):
                if place % self.every == self.offset:
                    del found.elements[key]
                elif place % self.every == self.offset + 1:
                    found.elements[key] = _changed(element)
        for place, chain in enumerate(table.chains.values()):
            if place % self.every == self.offset:
                chain.rules.clear()
        table.chains["mine"] = FakeChain(None, "", [rule(Goto("services"))])


def _changed(element: SetElement) -> SetElement:
    if isinstance(element.value, bytes):
        return replace(element, value=bytes(len(element.value)))
    return replace(element, comment="mine")


class Pause(Struct, frozen=True):
    """There is time for a sync."""


Event: TypeAlias = Delta | Configured | Refuses | Foreign | Restarted | Damaged | Pause


def family_contexts() -> st.SearchStrategy[dict[Family, Context]]:
    return st.fixed_dictionaries({family: contexts(family) for family in Family})


def events() -> st.SearchStrategy[Event]:
    return weighted(
        (8, contested_deltas()),
        (4, st.just(Pause())),
        (1, st.builds(Configured, family_contexts())),
        (1, st.builds(Refuses, st.integers(0, 2))),
        (1, st.just(Foreign())),
        (2, st.builds(Restarted, st.sampled_from(SIZES))),
        (1, st.builds(Damaged, st.integers(2, 4), st.integers(0, 3), st.sampled_from(SIZES))),
    )


def histories(length: int = 8) -> st.SearchStrategy[list[Event]]:
    """Histories that begin with a cluster, so that what follows changes something."""
    services = st.lists(contested_services(), min_size=2, max_size=3, unique_by=lambda each: each.name)
    slices = st.lists(serving_slices(), min_size=2, max_size=3, unique_by=lambda each: each.name)
    return st.builds(
        lambda *start, more: [*(Replace(type(each[0]), tuple(each)) for each in start), *more],
        services,
        slices,
        more=st.lists(events(), min_size=length, max_size=4 * length),
    )


def refusing(after: int) -> Callable[[Transaction], str | None]:
    left = after

    def refuse(change: Transaction) -> str | None:
        nonlocal left
        left -= 1
        return "Cannot allocate memory" if left < 0 else None

    return refuse


def lead(proxy: TablesProxy, history: Sequence[Event]) -> TablesProxy:
    """Lead a proxy through events and return the one that runs at their end."""
    for event in history:
        for kernel in proxy.kernels.values():
            happen(kernel, event)
        match event:
            case Configured():
                proxy.contexts = event.contexts
            case Restarted() | Damaged():
                proxy = proxy.restarted(event.batch_frontends)
            case Pause():
                proxy.try_sync()
            case Upsert() | Delete() | Replace():
                proxy.apply(event)
    return proxy


def happen(kernel: FakeTable, event: Event) -> None:
    """What an event means to a table."""
    match event:
        case Refuses():
            kernel.refuse = refusing(event.after)
        case Foreign():
            kernel.current += 1
        case Damaged() if kernel.table is not None:
            event.apply(kernel.table)


@settings(deadline=None, max_examples=300)
@given(family_contexts(), histories(), st.sampled_from(SIZES))
def test_any_sequence_ends_like_a_fresh_start(contexts: Contexts, history: list[Event], size: int) -> None:
    proxy = lead(TablesProxy(contexts, batch_frontends=size), history)
    proxy.settle()
    assert proxy.tables() == proxy.fresh().tables()
    assert proxy.verify()
