"""Deltas: changes to objects, as reported by the API server or by files. Only deltas change the desired state. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from msgspec import Struct

from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

Object: TypeAlias = Service | EndpointSlice | Node | ServiceCIDR
Kind: TypeAlias = type[Service] | type[EndpointSlice] | type[Node] | type[ServiceCIDR]
BASIC_KINDS: tuple[Kind, ...] = (Service, EndpointSlice, Node)
"""The kinds of objects that both proxy modes need. nftables mode also needs ServiceCIDRs."""


class Upsert(Struct, frozen=True):
    """An object was created or changed."""

    object: Object


class Delete(Struct, frozen=True):
    """An object was deleted, or it no longer matches the selectors of the watch.

    `namespace` is "" for Nodes and ServiceCIDRs.
    """

    kind: Kind
    namespace: str
    name: str


class Replace(Struct, frozen=True):
    """All objects of one kind, from a complete list or from files.

    `unreadable` contains the namespace and name of each object that exists but is invalid or could not be decoded. The
    last known state of these objects stays in use. All known objects of the kind that are neither in `objects` nor in
    `unreadable` are deleted. `ignored` is the number of objects that get no rules, such as headless Services.

    The first `Replace` of a kind marks the kind as listed. Nothing is programmed until every kind is listed.
    """

    kind: Kind
    objects: Sequence[Object]
    unreadable: tuple[tuple[str, str], ...] = ()
    ignored: int = 0


class Invalid(Struct, frozen=True):
    """An object was created or changed, but its new state cannot be used. Its last known state stays in use."""

    kind: Kind
    namespace: str
    name: str


Delta: TypeAlias = Upsert | Delete | Replace | Invalid
