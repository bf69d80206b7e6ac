"""The desired state: what the sources have said so far, and what each delta changes in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.addresses import family_of
from kproxy.model.delta import BASIC_KINDS, Delta, Invalid, Kind, Object, Replace, Upsert
from kproxy.model.packed import pack, unpack
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceCIDR, ServiceKey

SliceKey: TypeAlias = str
"""An EndpointSlice's `namespace/name`."""


class StoreChange(Struct, frozen=True):
    """What a delta changed: the Services whose plans may differ now, and whether this Node or the ServiceCIDRs did.

    `last_changes` are the moments at which the changes of EndpointSlices began, as far as they say so, in
    seconds since the epoch, each with the family it belongs to. Lists have none: they tell no news. `appeared` are
    those of the Services that did not exist before.
    """

    services: frozenset[ServiceKey] = frozenset()
    node: bool = False
    last_changes: tuple[tuple[Family, float], ...] = ()
    service_cidrs: bool = False
    appeared: frozenset[ServiceKey] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.services) or self.node or self.service_cidrs


class Store:
    """Services, EndpointSlices, this Node and ServiceCIDRs, applied delta by delta.

    A delta that repeats what is known changes nothing. EndpointSlices may come before their Service. `kinds` are
    those that are kept, and have to be listed before the state is complete.

    Services and EndpointSlices are kept packed (as MessagePack), which takes a third of the memory: a node needs all of
    them now and then, but one or two at a time.
    """

    def __init__(self, node_name: str, kinds: Iterable[Kind] = BASIC_KINDS) -> None:
        self.node: Node | None = None
        self._node_exists = False
        self._node_name = node_name
        self._services: dict[ServiceKey, bytes] = {}
        self._slices: dict[SliceKey, bytes] = {}
        self._slices_of: dict[ServiceKey, tuple[SliceKey, ...]] = {}
        self._service_cidrs: dict[str, ServiceCIDR] = {}
        self._kinds = frozenset(kinds)
        self._unlisted = set(self._kinds)
        self._refused: set[tuple[str, str]] = set()
        self._ignored = 0

    @property
    def complete(self) -> bool:
        """Whether every kind has been listed once: before that, absence means nothing."""
        return not self._unlisted

    def has_listed(self, kind: Kind) -> bool:
        """Return whether a kind has been listed once."""
        return kind not in self._unlisted

    @property
    def node_missing(self) -> bool:
        """Whether the Nodes have been listed and this one is not, or no longer, among them.

        `node` still has what was last known of a Node that was deleted.
        """
        return self.has_listed(Node) and not self._node_exists

    @property
    def service_cidrs(self) -> tuple[str, ...]:
        """The ranges of all ServiceCIDRs, IPv4 first, in the order of their addresses, each once.

        Ranges of several ServiceCIDRs may overlap (KEP-1880): these may, too.
        """
        ranges = {cidr for found in self._service_cidrs.values() for cidr in found.cidrs}
        return tuple(sorted(ranges, key=_place))

    @property
    def invalid_services(self) -> int:
        """How many Services exist whose present object cannot be used."""
        return len(self._refused)

    @property
    def ignored_services(self) -> int:
        """How many Services the last list held that get no rules."""
        return self._ignored

    def service_keys(self) -> Iterator[ServiceKey]:
        """Iterate over all Services."""
        return iter(self._services)

    def service(self, key: ServiceKey) -> Service | None:
        """Return a Service, or None if there is none of that name."""
        packed = self._services.get(key)
        return unpack(Service, packed) if packed else None

    def slices(self, key: ServiceKey) -> list[EndpointSlice]:
        """Return the EndpointSlices of a Service, of both families."""
        return [unpack(EndpointSlice, self._slices[each]) for each in self._slices_of.get(key, ())]

    def apply(self, delta: Delta) -> StoreChange:
        """Take in one delta and return what it changed: nothing, if it is about ServiceCIDRs and they are not kept."""
        kind = type(delta.object) if isinstance(delta, Upsert) else delta.kind
        if kind is ServiceCIDR and kind not in self._kinds:
            return StoreChange()
        if isinstance(delta, Replace):
            return self._replace(delta)
        if isinstance(delta, Upsert):
            return self._put(delta.object)
        if isinstance(delta, Invalid):
            if delta.kind is Service:
                self._refused.add((delta.namespace, delta.name))
            if delta.kind is Node and delta.name == self._node_name:
                self._node_exists = True
            return StoreChange()
        return self._remove(delta.kind, delta.namespace, delta.name)

    def _replace(self, delta: Replace) -> StoreChange:
        self._unlisted.discard(delta.kind)
        if delta.kind is Service:
            self._refused, self._ignored = set(delta.unreadable), delta.ignored
        if delta.kind is Node:
            self._node_exists = ("", self._node_name) in delta.unreadable
        gone = self._identities(delta.kind).difference(delta.unreadable)
        changes = []
        for each in delta.objects:
            gone.discard(_identity(each))
            changes.append(self._put(each))
        changes += [self._remove(delta.kind, namespace, name) for namespace, name in gone]
        return StoreChange(
            frozenset().union(*(changed.services for changed in changes)),
            any(changed.node for changed in changes),
            service_cidrs=any(changed.service_cidrs for changed in changes),
            appeared=frozenset().union(*(changed.appeared for changed in changes)),
        )

    def _identities(self, kind: Kind) -> set[tuple[str, str]]:
        if kind is Service:
            return set(map(_split, self._services))
        if kind is EndpointSlice:
            return set(map(_split, self._slices))
        if kind is ServiceCIDR:
            return {("", name) for name in self._service_cidrs}
        return {("", self.node.name)} if self.node else set()

    def _put(self, found: Object) -> StoreChange:
        if isinstance(found, Service):
            return self._put_service(found)
        if isinstance(found, EndpointSlice):
            return self._put_slice(found)
        if isinstance(found, ServiceCIDR):
            known = self._service_cidrs.get(found.name)
            self._service_cidrs[found.name] = found
            return StoreChange(service_cidrs=known != found)
        return self._put_node(found)

    def _put_node(self, found: Node) -> StoreChange:
        if found.name != self._node_name:
            return StoreChange()
        self._node_exists = True
        if found == self.node:
            return StoreChange()
        self.node = found
        return StoreChange(node=True)

    def _put_service(self, found: Service) -> StoreChange:
        key, packed = found.key, pack(found)
        if self._refused:
            self._refused.discard((found.namespace, found.name))
        before = self._services.get(key)
        if before == packed:
            return StoreChange()
        self._services[key] = packed
        keys = frozenset({key})
        return StoreChange(keys, appeared=keys if before is None else frozenset())

    def _put_slice(self, found: EndpointSlice) -> StoreChange:
        key, packed = f"{found.namespace}/{found.name}", pack(found)
        if self._slices.get(key) == packed:
            return StoreChange()
        services = self._take_slice(key) | {found.service}
        self._slices[key] = packed
        self._slices_of[found.service] = (*self._slices_of.get(found.service, ()), key)
        return StoreChange(services, last_changes=((found.family, found.last_change),) if found.last_change else ())

    def _take_slice(self, key: SliceKey) -> frozenset[ServiceKey]:
        """Forget an EndpointSlice; return the Service that it belonged to, nothing if there is no such slice."""
        packed = self._slices.pop(key, None)
        if packed is None:
            return frozenset()
        owner = unpack(EndpointSlice, packed).service
        left = tuple(each for each in self._slices_of.pop(owner) if each != key)
        if left:
            self._slices_of[owner] = left
        return frozenset({owner})

    def _remove(self, kind: Kind, namespace: str, name: str) -> StoreChange:
        if kind is Service:
            key = f"{namespace}/{name}"
            self._refused.discard((namespace, name))
            return StoreChange(frozenset({key})) if self._services.pop(key, None) else StoreChange()
        if kind is EndpointSlice:
            return StoreChange(self._take_slice(f"{namespace}/{name}"))
        if kind is ServiceCIDR:
            return StoreChange(service_cidrs=self._service_cidrs.pop(name, None) is not None)
        if name != self._node_name:
            return StoreChange()
        self._node_exists = False
        if self.node is None or self.node.being_deleted:
            return StoreChange()
        # The machine is still here and serves: what its Node said of it stays true.
        self.node = replace(self.node, being_deleted=True)
        return StoreChange(node=True)


def _split(key: str) -> tuple[str, str]:
    namespace, _, name = key.partition("/")
    return namespace, name


def _place(cidr: str) -> tuple[bool, IPv4Network | IPv6Network]:
    return family_of(cidr) is Family.IPV6, ip_network(cidr)


def _identity(found: Object) -> tuple[str, str]:
    return ("", found.name) if isinstance(found, Node | ServiceCIDR) else (found.namespace, found.name)
