"""A page of the objects that the daemon knows, as the control socket reports them. Pure."""

from __future__ import annotations

from msgspec import Struct

from kproxy.model.types import EndpointSlice, Node, Service

PAGE_SERVICES = 500
"""The number of Services on one page: few enough that a health check never waits long for a page."""


class ObjectPage(Struct, frozen=True):
    """Some Services with their EndpointSlices. `node` and `service_cidrs` are on every page.

    `more` is true if further pages follow.
    """

    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]
    node: Node | None
    service_cidrs: tuple[str, ...]
    more: bool
