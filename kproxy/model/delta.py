"""Deltas: changes that a source of objects reports. Only deltas change the desired state. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

Object: TypeAlias = Service | EndpointSlice | Node | ServiceCIDR
Kind: TypeAlias = type[Service] | type[EndpointSlice] | type[Node] | type[ServiceCIDR]
BASIC_KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node)
"""The kinds that both modes need. ServiceCIDRs are used in nftables mode only."""


class Upsert(Struct, frozen=True):
    """An object was created or changed."""

    object: Object


class Delete(Struct, frozen=True):
    """An object was deleted or is no longer selected. `namespace` is "" for Nodes and ServiceCIDRs."""

    kind: Kind
    namespace: str
    name: str


class Replace(Struct, frozen=True):
    """All objects of one kind, as a list request returned them.

    Every other object of the kind is deleted, except those in `unreadable` (namespace, name): they exist but could not
    be decoded, so their last known state stays. `ignored` is the number of objects that get no rules, such as headless
    Services. The first `Replace` of a kind marks the kind as listed; nothing is programmed until every kind is listed.
    """

    kind: Kind
    objects: Sequence[Object]
    unreadable: tuple[tuple[str, str], ...] = ()
    ignored: int = 0


class Invalid(Struct, frozen=True):
    """An object was created or changed, but cannot be used. Its last known state stays."""

    kind: Kind
    namespace: str
    name: str


Delta: TypeAlias = Upsert | Delete | Replace | Invalid
