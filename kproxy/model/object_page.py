"""A page of the objects that the daemon knows, as the control socket reports them. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from kproxy.model.types import EndpointSlice, Node, Service

if TYPE_CHECKING:
    from kproxy.model.store import Store

PAGE_SERVICES = 500
"""The maximum number of Services on one page: few enough that a health check never waits long for a page."""
PAGE_ENDPOINTS = 5000
"""The maximum number of endpoints and ports on one page, unless one object alone has more. They have about 1 MB."""


class ObjectPage(Struct, frozen=True):
    """Some Services and EndpointSlices. `node` and `service_cidrs` are on every page.

    The EndpointSlices of a Service follow it on the same page and, if there are many, on the next ones. `following` is
    where the next page starts, "" if there is none.
    """

    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]
    node: Node | None
    service_cidrs: tuple[str, ...]
    following: str = ""


def make_page(store: Store, start: str) -> ObjectPage:
    """Return the page of a store that starts at `start`: "" for the first one, or `ObjectPage.following`.

    It is the key of a Service and the name of one of its EndpointSlices, "" for the Service itself, separated by a
    slash. If these have been deleted meanwhile, the page starts with the objects that come after them.
    """
    services: list[Service] = []
    slices: list[EndpointSlice] = []
    size, following = 0, ""
    for position, each in _objects_from(store, start):
        size += len(each.ports) + (len(each.endpoints) if isinstance(each, EndpointSlice) else 0)
        full = len(services) == PAGE_SERVICES and isinstance(each, Service)
        if full or (size > PAGE_ENDPOINTS and (services or slices)):
            following = position
            break
        if isinstance(each, Service):
            services.append(each)
        else:
            slices.append(each)
    return ObjectPage(tuple(services), tuple(slices), store.node, store.service_cidrs, following)


def _objects_from(store: Store, start: str) -> Iterator[tuple[str, Service | EndpointSlice]]:
    """Yield each Service, in the order of the keys, and then its EndpointSlices, each with its position."""
    first_key, _, first_name = start.rpartition("/")
    keys = sorted(store.service_keys())
    for key in keys[bisect_left(keys, first_key) :]:
        first = first_name if key == first_key else ""
        if not first and (service := store.service(key)) is not None:
            yield f"{key}/", service
        for slice_key in sorted(store.slice_keys(key)):
            name = slice_key.partition("/")[2]
            if name >= first:
                yield f"{key}/{name}", store.slice(slice_key)
