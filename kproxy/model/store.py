"""The desired state: the objects that the sources reported, and the effect of each delta on them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import starmap
from typing import TypeAlias

from msgspec import Raw, Struct
from msgspec.structs import replace

from kproxy.model.addresses import family_of
from kproxy.model.delta import BASIC_KINDS, Delta, Invalid, Kind, Object, Replace, Upsert
from kproxy.model.packed_objects import PackedSequence, object_key, pack, unpack
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceCIDR, ServiceKey

SliceKey: TypeAlias = str
"""An EndpointSlice's `namespace/name`."""


class StoreChange(Struct, frozen=True):
    """What a delta changed: the Services to plan again, and whether this Node or the ServiceCIDRs changed.

    `appeared` contains those `services` that did not exist before. `last_changes` contains one pair for each new or
    changed EndpointSlice with a known `last_change`: the family of the slice, and the time at which the change was
    triggered, in seconds since the epoch. It is always empty for a `Replace`.

    If `families` is not None, the plans of all other families are the same as before.
    """

    services: frozenset[ServiceKey] = frozenset()
    node: bool = False
    last_changes: tuple[tuple[Family, float], ...] = ()
    service_cidrs: bool = False
    appeared: frozenset[ServiceKey] = frozenset()
    families: frozenset[Family] | None = None

    def __bool__(self) -> bool:
        return bool(self.services) or self.node or self.service_cidrs

    def affects(self, family: Family) -> bool:
        """Return whether the plans of a family may have changed."""
        return self.families is None or family in self.families


class _SliceHead(Struct, array_like=True, gc=False):
    """The fields of a packed EndpointSlice. Those that the store does not need stay packed."""

    namespace: str
    name: str
    service: ServiceKey
    family: Family
    endpoints: Raw
    ports: Raw
    last_change: float
    invalid: int


class Store:
    """The Services, EndpointSlices and ServiceCIDRs of the cluster, and this Node.

    A delta that repeats the known state changes nothing. EndpointSlices may arrive before their Service. `kinds` are
    the kinds of objects to store; all of them must be listed before the state is complete.

    Services and EndpointSlices are stored packed, because only a few of them are needed at the same time (see
    `kproxy.model.packed_objects`).

    If several threads use the store, each of them must hold `lock` while it calls any method or reads any property. The
    exceptions are `node`, `invalid_services` and `invalid_endpoints`, which are read in one step: health and metrics do
    not wait for the lock.
    """

    def __init__(
        self,
        node_name: str,
        kinds: Iterable[Kind] = BASIC_KINDS,
        *,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        """Create an empty store. `lock` must be reentrant; the default does not lock anything."""
        self.lock = lock or nullcontext()
        self.node: Node | None = None
        self._node_exists = False
        self._node_name = node_name
        self._services: dict[ServiceKey, bytes] = {}
        self._slices: dict[SliceKey, bytes] = {}
        self._slices_of: dict[ServiceKey, SliceKey | tuple[SliceKey, ...]] = {}  # most Services have one slice
        self._service_cidrs: dict[str, ServiceCIDR] = {}
        self._kinds = frozenset(kinds)
        self._unlisted = set(self._kinds)
        self._invalid: set[tuple[str, str]] = set()
        self._invalid_endpoints: dict[SliceKey, int] = {}
        self._ignored = 0

    @property
    def complete(self) -> bool:
        """Whether every kind has been listed. Until then, the cluster may contain objects that the store does not."""
        return not self._unlisted

    def has_listed(self, kind: Kind) -> bool:
        """Return whether a `Replace` of this kind has been applied."""
        return kind not in self._unlisted

    @property
    def node_missing(self) -> bool:
        """Whether this Node does not exist. Always false until Nodes have been listed.

        `node` keeps the last known state of a deleted Node.
        """
        return self.has_listed(Node) and not self._node_exists

    @property
    def service_cidrs(self) -> tuple[str, ...]:
        """The distinct ranges of all ServiceCIDRs, IPv4 first, sorted by address. They may overlap (KEP-1880)."""
        ranges = {cidr for each in self._service_cidrs.values() for cidr in each.cidrs}
        return tuple(sorted(ranges, key=_cidr_order))

    @property
    def invalid_services(self) -> int:
        """The number of Services whose current state cannot be used."""
        return len(self._invalid)

    def is_invalid(self, key: ServiceKey) -> bool:
        """Return whether the current state of a Service cannot be used."""
        namespace, _, name = key.partition("/")
        return (namespace, name) in self._invalid

    @property
    def invalid_endpoints(self) -> int:
        """The number of endpoints and ports of all EndpointSlices that are ignored because they cannot be used."""
        return sum(tuple(self._invalid_endpoints.values()))

    @property
    def ignored_services(self) -> int:
        """The number of Services that get no rules, such as headless Services, as of the last `Replace`."""
        return self._ignored

    def service_keys(self) -> Iterator[ServiceKey]:
        """Iterate over the keys of all Services."""
        return iter(self._services)

    def service(self, key: ServiceKey) -> Service | None:
        """Return a Service, or None if it does not exist."""
        packed = self._services.get(key)
        return unpack(Service, packed) if packed else None

    def slices(self, key: ServiceKey) -> list[EndpointSlice]:
        """Return the EndpointSlices of a Service in both IP families."""
        return [unpack(EndpointSlice, self._slices[each]) for each in self.slice_keys(key)]

    def slice_keys(self, key: ServiceKey) -> tuple[SliceKey, ...]:
        """Return the keys of the EndpointSlices of a Service in both IP families."""
        found = self._slices_of.get(key, ())
        return (found,) if isinstance(found, str) else found

    def slice(self, key: SliceKey) -> EndpointSlice:
        """Return an EndpointSlice that exists."""
        return unpack(EndpointSlice, self._slices[key])

    def apply(self, delta: Delta) -> StoreChange:
        """Apply one delta and return what it changed. Ignore a ServiceCIDR unless `kinds` contains ServiceCIDR."""
        kind = type(delta.object) if isinstance(delta, Upsert) else delta.kind
        if kind is ServiceCIDR and kind not in self._kinds:
            return StoreChange()
        if isinstance(delta, Replace):
            return self._replace(delta)
        if isinstance(delta, Upsert):
            return self._put(delta.object)
        if isinstance(delta, Invalid):
            if delta.kind is Service:
                self._invalid.add((delta.namespace, delta.name))
            if delta.kind is Node and delta.name == self._node_name:
                self._node_exists = True
            return StoreChange()
        return self._remove(delta.kind, delta.namespace, delta.name)

    def _replace(self, delta: Replace) -> StoreChange:
        self._unlisted.discard(delta.kind)
        if delta.kind is Service:
            self._invalid, self._ignored = set(delta.unreadable), delta.ignored
            return self._replace_services(delta)
        if delta.kind is EndpointSlice:
            return self._replace_slices(delta)
        if delta.kind is Node:
            self._node_exists = ("", self._node_name) in delta.unreadable
        deleted = self._identities(delta.kind).difference(delta.unreadable)
        changes = []
        for each in delta.objects:
            deleted.discard(_identity(each))
            changes.append(self._put(each))
        changes += [self._remove(delta.kind, namespace, name) for namespace, name in deleted]
        return StoreChange(
            node=any(changed.node for changed in changes),
            service_cidrs=any(changed.service_cidrs for changed in changes),
        )

    # A list of Services or EndpointSlices can be long, so its objects stay packed, and their changes are added up.

    def _replace_services(self, delta: Replace) -> StoreChange:
        deleted = set(self._services).difference(starmap(object_key, delta.unreadable))
        changed: set[ServiceKey] = set()
        appeared: set[ServiceKey] = set()
        for key, packed in _packed_by_key(delta.objects).items():
            deleted.discard(key)
            before = self._services.get(key)
            if before != packed:
                self._services[key] = packed
                changed.add(key)
            if before is None:
                appeared.add(key)
        for key in deleted:
            del self._services[key]
        return StoreChange(frozenset(changed | deleted), appeared=frozenset(appeared))

    def _replace_slices(self, delta: Replace) -> StoreChange:
        deleted = set(self._slices).difference(starmap(object_key, delta.unreadable))
        changed: set[ServiceKey] = set()
        for key, packed in _packed_by_key(delta.objects).items():
            deleted.discard(key)
            if self._slices.get(key) != packed:
                changed |= self._put_packed_slice(key, packed)
        for key in deleted:
            changed |= self._remove_slice(key).services
        return StoreChange(frozenset(changed))

    def _identities(self, kind: Kind) -> set[tuple[str, str]]:
        if kind is ServiceCIDR:
            return {("", name) for name in self._service_cidrs}
        return {("", self.node.name)} if self.node else set()

    def _put(self, obj: Object) -> StoreChange:
        if isinstance(obj, Service):
            return self._put_service(obj)
        if isinstance(obj, EndpointSlice):
            return self._put_slice(obj)
        if isinstance(obj, ServiceCIDR):
            known = self._service_cidrs.get(obj.name)
            self._service_cidrs[obj.name] = obj
            return StoreChange(service_cidrs=known != obj)
        return self._put_node(obj)

    def _put_node(self, node: Node) -> StoreChange:
        if node.name != self._node_name:
            return StoreChange()
        self._node_exists = True
        if node == self.node:
            return StoreChange()
        self.node = node
        return StoreChange(node=True)

    def _put_service(self, service: Service) -> StoreChange:
        key, packed = service.key, pack(service)
        if self._invalid:
            self._invalid.discard((service.namespace, service.name))
        before = self._services.get(key)
        if before == packed:
            return StoreChange()
        self._services[key] = packed
        keys = frozenset({key})
        families = _families(service) | (_families(unpack(Service, before)) if before is not None else frozenset())
        return StoreChange(keys, appeared=keys if before is None else frozenset(), families=families)

    def _put_slice(self, endpoint_slice: EndpointSlice) -> StoreChange:
        key, new = object_key(*_identity(endpoint_slice)), pack(endpoint_slice)
        if self._slices.get(key) == new:
            return StoreChange()
        families = {endpoint_slice.family} | self._family_of_slice(key)
        services = self._put_packed_slice(key, new)
        return StoreChange(
            services,
            families=frozenset(families),
            last_changes=((endpoint_slice.family, endpoint_slice.last_change),) if endpoint_slice.last_change else (),
        )

    def _family_of_slice(self, key: SliceKey) -> set[Family]:
        known = self._slices.get(key)
        return {unpack(_SliceHead, known).family} if known is not None else set()

    def _put_packed_slice(self, key: SliceKey, packed: bytes) -> frozenset[ServiceKey]:
        """Store a new or changed EndpointSlice. Return the Services that it belongs to, and belonged to before."""
        head = unpack(_SliceHead, packed)
        services = self._remove_slice(key).services | {head.service}
        self._slices[key] = packed
        if head.invalid:
            self._invalid_endpoints[key] = head.invalid
        others = self.slice_keys(head.service)
        self._slices_of[head.service] = (*others, key) if others else key
        return services

    def _remove_slice(self, key: SliceKey) -> StoreChange:
        """Remove an EndpointSlice, if it exists."""
        packed = self._slices.pop(key, None)
        self._invalid_endpoints.pop(key, None)
        if packed is None:
            return StoreChange()
        removed = unpack(_SliceHead, packed)
        owner = removed.service
        others = tuple(each for each in self.slice_keys(owner) if each != key)
        if others:
            self._slices_of[owner] = others if len(others) > 1 else others[0]
        else:
            del self._slices_of[owner]
        return StoreChange(frozenset({owner}), families=frozenset({removed.family}))

    def _remove_service(self, namespace: str, name: str) -> StoreChange:
        key = object_key(namespace, name)
        self._invalid.discard((namespace, name))
        packed = self._services.pop(key, None)
        if packed is None:
            return StoreChange()
        return StoreChange(frozenset({key}), families=_families(unpack(Service, packed)))

    def _remove(self, kind: Kind, namespace: str, name: str) -> StoreChange:
        if kind is Service:
            return self._remove_service(namespace, name)
        if kind is EndpointSlice:
            return self._remove_slice(object_key(namespace, name))
        if kind is ServiceCIDR:
            return StoreChange(service_cidrs=self._service_cidrs.pop(name, None) is not None)
        if name != self._node_name:
            return StoreChange()
        self._node_exists = False
        if self.node is None or self.node.being_deleted:
            return StoreChange()
        # The machine still exists and serves traffic, so kproxy keeps using the last state of its Node.
        self.node = replace(self.node, being_deleted=True)
        return StoreChange(node=True)


def _families(service: Service) -> frozenset[Family]:
    return frozenset([family_of(address) for address in service.cluster_ips])


def _packed_by_key(objects: Sequence[Object]) -> Mapping[str, bytes]:
    """Return Services or EndpointSlices, packed, by `object_key`."""
    if isinstance(objects, PackedSequence):
        return objects.by_key
    return {object_key(*_identity(each)): pack(each) for each in objects}


def _cidr_order(cidr: str) -> tuple[bool, IPv4Network | IPv6Network]:
    return family_of(cidr) is Family.IPV6, ip_network(cidr)


def _identity(obj: Object) -> tuple[str, str]:
    return ("", obj.name) if isinstance(obj, Node | ServiceCIDR) else (obj.namespace, obj.name)
