"""What a source of objects says: the only messages that change the desired state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

Object: TypeAlias = Service | EndpointSlice | Node | ServiceCIDR
Kind: TypeAlias = type[Service] | type[EndpointSlice] | type[Node] | type[ServiceCIDR]
BASIC_KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node)
"""The kinds that no mode can do without. Only nftables mode has a use for ServiceCIDRs too."""


class Upsert(Struct, frozen=True):
    """An object was created or changed."""

    object: Object


class Delete(Struct, frozen=True):
    """An object is gone, or no longer of interest. `namespace` is "" for Nodes and ServiceCIDRs."""

    kind: Kind
    namespace: str
    name: str


class Replace(Struct, frozen=True):
    """The complete set of objects of one kind, as a first or a later list found them.

    Whatever is not in `objects` is gone, except what `unreadable` names (namespace, name): those objects
    exist, but could not be decoded, and whatever was known of them before stays. `ignored` counts objects that get no
    rules, such as headless Services. The first of these for a kind marks it as listed: nothing is programmed before
    every kind is.
    """

    kind: Kind
    objects: Sequence[Object]
    unreadable: tuple[tuple[str, str], ...] = ()
    ignored: int = 0


class Invalid(Struct, frozen=True):
    """An object was created or changed, but cannot be used; whatever was known of it before stays."""

    kind: Kind
    namespace: str
    name: str


Delta: TypeAlias = Upsert | Delete | Replace | Invalid
