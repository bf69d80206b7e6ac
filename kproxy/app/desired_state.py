"""Where a command that compares gets the desired state from: object files, or the daemon of this node."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from msgspec import Struct

from kproxy.app.context_factory import ContextFactory
from kproxy.app.family_contexts import assumed_context
from kproxy.app.nftables_families import with_possible_counters
from kproxy.app.node_settings import local_node_name
from kproxy.app.one_shot import load_store
from kproxy.config import Config
from kproxy.host.nfacct import has_counters
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.context import Context
from kproxy.model.delta import Replace
from kproxy.model.object_page import ObjectPage
from kproxy.model.service_state import FamilyWaiting, ServiceState
from kproxy.model.store import Store
from kproxy.model.sync_report import SyncError
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceCIDR
from kproxy.nftables.kernel import NetlinkCommit
from kproxy.sync.family_sync import LARGE_CLUSTER_ENDPOINTS
from kproxy.sync.planning import PlannedFamily, plan_family

MakeContext = Callable[[Node | None], Context]


class DesiredState(Struct, frozen=True):
    """The desired state of the node: where it comes from, the mode, and the plans of each family.

    `contexts` make the context of each family for a Node object. `dispatch_threshold` is the setting
    `kproxy.iptablesDispatchThreshold`. `notes` are reasons for which the kernel may differ.
    """

    source: str
    mode: str
    node_name: str
    store: Store
    families: Mapping[Family, PlannedFamily]
    contexts: Mapping[Family, MakeContext]
    dispatch_threshold: int
    notes: tuple[str, ...] = ()

    @property
    def services(self) -> int:
        """The number of Services."""
        return sum(1 for _ in self.store.service_keys())


def from_files(config: Config, objects: str, contexts: Mapping[Family, MakeContext]) -> DesiredState:
    """Return the desired state that object files describe. Raises `FileSourceError` or `SyncError`."""
    store = load_store(config, objects)
    mode = config.effective_mode
    families = _plan_all(store, contexts, mode)
    threshold = config.kproxy.iptables_dispatch_threshold
    return DesiredState(objects, mode, local_node_name(config), store, families, contexts, threshold)


def from_daemon(
    pages: Iterable[ObjectPage], waiting: Mapping[Family, FamilyWaiting], empty: ServiceState
) -> DesiredState:
    """Return the desired state that a daemon has, given its objects and what is `waiting`.

    `empty` is what the daemon knows about a Service that does not exist. Raises `SyncError` if the daemon has not
    programmed any rules yet.
    """
    contexts = {family: each.context for family, each in empty.families.items()}
    known = {family: context for family, context in contexts.items() if context is not None}
    if not known:
        raise SyncError("the daemon has not programmed any rules yet; see `kproxy status`")
    cidrs = dict.fromkeys(cidr for context in known.values() for cidr in context.service_cidrs)
    found = list(pages)
    store = Store(empty.node_name, (Service, EndpointSlice, Node, ServiceCIDR))
    store.apply(Replace(Service, tuple(service for page in found for service in page.services)))
    store.apply(Replace(EndpointSlice, tuple(each for page in found for each in page.slices)))
    store.apply(Replace(Node, (empty.node,) if empty.node is not None else ()))
    store.apply(Replace(ServiceCIDR, _cidr_objects(cidrs)))
    makers = {family: _constant(context) for family, context in known.items()}
    families = _plan_all(store, makers, empty.mode)
    return DesiredState(
        source="the daemon",
        mode=empty.mode,
        node_name=empty.node_name,
        store=store,
        families=families,
        contexts=makers,
        dispatch_threshold=empty.iptables_dispatch_threshold,
        notes=tuple(_notes(waiting)),
    )


def assumed_contexts(config: Config) -> dict[Family, MakeContext]:
    """Return functions that make the contexts of this node without inspecting the kernel, as for `kproxy render`."""
    return {family: partial(assumed_context, config, family, local_node_name(config)) for family in Family}


def kernel_contexts(config: Config, runners: Mapping[Family, IptablesRunner]) -> dict[Family, MakeContext]:
    """Return functions that make the contexts of this node as `kproxy apply` does, without creating packet counters.

    `runners` are the runners of the families in iptables mode. In nftables mode, they are empty, and the result has
    both families. The functions raise `SyncError`.
    """
    if config.effective_mode == "nftables":
        configs = {family: with_possible_counters(config, family, NetlinkCommit(family)) for family in Family}
        return {
            family: ContextFactory(each, family, accounting=lambda: False, random_fully=True).make
            for family, each in configs.items()
        }
    return {
        family: ContextFactory(config, family, accounting=has_counters, random_fully=runner.version().random_fully).make
        for family, runner in runners.items()
    }


def changed(state: DesiredState, store: Store) -> dict[Family, PlannedFamily]:
    """Return the plans that result from other objects on the same node. Raises `SyncError`.

    If `store` has no Node or no ServiceCIDRs, because the files contain only what changes, those of `state` remain.
    """
    if store.node is None and state.store.node is not None:
        store.apply(Replace(Node, (state.store.node,)))
    if not store.service_cidrs and state.store.service_cidrs:
        store.apply(Replace(ServiceCIDR, _cidr_objects(state.store.service_cidrs)))
    return _plan_all(store, state.contexts, state.mode)


def _plan_all(store: Store, contexts: Mapping[Family, MakeContext], mode: str) -> dict[Family, PlannedFamily]:
    # As in `make_families`: `large_cluster` changes nothing in nftables mode.
    limit = math.inf if mode == "nftables" else LARGE_CLUSTER_ENDPOINTS
    return {family: plan_family(store, make, large_cluster_endpoints=limit) for family, make in contexts.items()}


def _cidr_objects(cidrs: Iterable[str]) -> tuple[ServiceCIDR, ...]:
    return tuple(ServiceCIDR(cidr, (cidr,)) for cidr in cidrs)


def _constant(context: Context) -> MakeContext:
    return lambda _: context


def _notes(waiting: Mapping[Family, FamilyWaiting]) -> Iterator[str]:
    for family, each in waiting.items():
        for key, reason in sorted(each.quarantined.items()):
            yield f"{family.value}: the kernel rejects the rules of {key}: {reason}"
        for key in sorted({*each.pending} - each.quarantined.keys()):
            yield f"{family.value}: a change of {key} has not been programmed yet"
