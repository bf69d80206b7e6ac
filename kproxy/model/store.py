"""The desired state: what the sources have said so far, and what each delta changes in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.delta import Delta, Kind, Replace, Upsert
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceKey


class Changed(Struct, frozen=True):
    """What a delta changed: the Services whose plans may differ now, and whether this Node did.

    `last_changes` are the moments at which the changes of EndpointSlices began, as far as they say so, in
    seconds since the epoch, each with the family it belongs to. Lists have none: they tell no news.
    """

    services: frozenset[ServiceKey] = frozenset()
    node: bool = False
    last_changes: tuple[tuple[Family, float], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.services) or self.node


class Store:
    """Services, EndpointSlices and this Node, applied delta by delta.

    A delta that repeats what is known changes nothing. EndpointSlices may come before their Service.
    """

    def __init__(self, node_name: str) -> None:
        self.node: Node | None = None
        self._node_name = node_name
        self._services: dict[ServiceKey, Service] = {}
        self._slices: dict[ServiceKey, dict[str, EndpointSlice]] = {}
        self._slice_owner: dict[str, ServiceKey] = {}
        self._unlisted: set[Kind] = {Service, EndpointSlice, Node}

    @property
    def complete(self) -> bool:
        """Whether every kind has been listed once: before that, absence means nothing."""
        return not self._unlisted

    def service_keys(self) -> Iterator[ServiceKey]:
        """Iterate over all Services."""
        return iter(self._services)

    def service(self, key: ServiceKey) -> Service | None:
        """Return a Service, or None if there is none of that name."""
        return self._services.get(key)

    def slices(self, key: ServiceKey) -> Iterable[EndpointSlice]:
        """Return the EndpointSlices of a Service, of both families."""
        return self._slices.get(key, {}).values()

    def apply(self, delta: Delta) -> Changed:
        """Take in one delta and return what it changed."""
        if isinstance(delta, Replace):
            return self._replace(delta)
        if isinstance(delta, Upsert):
            return self._put(delta.object)
        return self._remove(delta.kind, delta.namespace, delta.name)

    def _replace(self, delta: Replace) -> Changed:
        self._unlisted.discard(delta.kind)
        present = {_identity(each) for each in delta.objects}
        present.update(delta.unreadable)
        gone = self._identities(delta.kind) - present
        changes = [self._remove(delta.kind, namespace, name) for namespace, name in gone]
        changes += [self._put(each) for each in delta.objects]
        return Changed(
            frozenset().union(*(changed.services for changed in changes)),
            any(changed.node for changed in changes),
        )

    def _identities(self, kind: Kind) -> set[tuple[str, str]]:
        if kind is Service:
            return {(each.namespace, each.name) for each in self._services.values()}
        if kind is EndpointSlice:
            return {(each.namespace, each.name) for group in self._slices.values() for each in group.values()}
        return {("", self.node.name)} if self.node else set()

    def _put(self, found: Service | EndpointSlice | Node) -> Changed:
        if isinstance(found, Service):
            key = found.key
            if self._services.get(key) == found:
                return Changed()
            self._services[key] = found
            return Changed(frozenset({key}))
        if isinstance(found, EndpointSlice):
            return self._put_slice(found)
        if found.name != self._node_name or found == self.node:
            return Changed()
        self.node = found
        return Changed(node=True)

    def _put_slice(self, found: EndpointSlice) -> Changed:
        owner = self._slice_owner.get(_slice_key(found.namespace, found.name))
        if owner == found.service and self._slices[owner][found.name] == found:
            return Changed()
        moved = self._remove(EndpointSlice, found.namespace, found.name) if owner not in {None, found.service} else None
        self._slice_owner[_slice_key(found.namespace, found.name)] = found.service
        self._slices.setdefault(found.service, {})[found.name] = found
        services = frozenset({found.service}) | (moved.services if moved else frozenset())
        return Changed(services, last_changes=((found.family, found.last_change),) if found.last_change else ())

    def _remove(self, kind: Kind, namespace: str, name: str) -> Changed:
        if kind is Service:
            key = f"{namespace}/{name}"
            return Changed(frozenset({key})) if self._services.pop(key, None) else Changed()
        if kind is EndpointSlice:
            owner = self._slice_owner.pop(_slice_key(namespace, name), None)
            if owner is None:
                return Changed()
            group = self._slices[owner]
            del group[name]
            if not group:
                del self._slices[owner]
            return Changed(frozenset({owner}))
        if self.node is None or self.node.name != name or self.node.being_deleted:
            return Changed()
        # The machine is still here and serves: what its Node said of it stays true.
        self.node = replace(self.node, being_deleted=True)
        return Changed(node=True)


def _slice_key(namespace: str, name: str) -> str:
    return f"{namespace}/{name}"


def _identity(found: Service | EndpointSlice | Node) -> tuple[str, str]:
    return ("", found.name) if isinstance(found, Node) else (found.namespace, found.name)
