"""Select the endpoints of a service port by traffic policy, endpoint state and topology hints. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from kproxy.model.types import Endpoint, EndpointSlice, Family

Sockets: TypeAlias = tuple[str, ...]
"""Endpoints as `ip:port` strings."""


def endpoints_by_socket(
    slices: Iterable[EndpointSlice], family: Family, port_name: str, protocol: str
) -> dict[str, Endpoint]:
    """Return the endpoints of one service port, keyed by `ip:port` and sorted by key.

    An EndpointSlice port belongs to the service port with the same name and protocol. While an endpoint moves from one
    slice to another, both slices may list it, possibly in different states. In that case, an entry that is not
    terminating is preferred, then one that is ready, then one that is serving. If the entries agree on all three, the
    first one is used.
    """
    endpoints: dict[str, Endpoint] = {}
    for endpoint_slice in slices:
        if endpoint_slice.family is not family:
            continue
        for port in endpoint_slice.ports:
            if port.name == port_name and port.protocol == protocol:
                _add(endpoints, endpoint_slice.endpoints, port.port, ipv6=family is Family.IPV6)
    return {socket: endpoints[socket] for socket in sorted(endpoints)} if len(endpoints) > 1 else endpoints


def _add(by_socket: dict[str, Endpoint], endpoints: Iterable[Endpoint], port: int, *, ipv6: bool) -> None:
    suffix = f"]:{port}" if ipv6 else f":{port}"
    for endpoint in endpoints:
        socket = f"[{endpoint.address}{suffix}" if ipv6 else endpoint.address + suffix
        known = by_socket.get(socket)
        if known is None or _preference(endpoint) > _preference(known):
            by_socket[socket] = endpoint


def _preference(endpoint: Endpoint) -> tuple[bool, bool, bool]:
    return (not endpoint.terminating, endpoint.ready, endpoint.serving)


def usable(endpoints: Mapping[str, Endpoint]) -> Sockets:
    """Return the ready endpoints. If none is ready, return those that are both serving and terminating (KEP-1669)."""
    ready = tuple([socket for socket, endpoint in endpoints.items() if endpoint.ready])
    return ready or tuple(
        [socket for socket, endpoint in endpoints.items() if endpoint.serving and endpoint.terminating]
    )


def serving(endpoints: Mapping[str, Endpoint]) -> Sockets:
    """Return the endpoints that are ready or serving."""
    return tuple(socket for socket, endpoint in endpoints.items() if endpoint.ready or endpoint.serving)


def cluster_endpoints(endpoints: Mapping[str, Endpoint], node: str, zone: str) -> Sockets:
    """Return the endpoints for traffic with policy Cluster, honoring topology hints.

    Node hints (KEP-3015) take precedence over zone hints (KEP-2433). Node hints are used only if every ready endpoint
    has node hints and at least one endpoint has a hint for this node. Likewise, zone hints are used only if every ready
    endpoint has zone hints and at least one endpoint has a hint for this node's zone. If neither kind of hint can be
    used, all usable endpoints are returned.
    """
    sockets = tuple([socket for socket, endpoint in endpoints.items() if endpoint.ready])
    if not sockets:
        return usable(endpoints)
    first = endpoints[sockets[0]]
    if not (first.for_nodes or first.for_zones):
        return sockets
    ready = {socket: endpoints[socket] for socket in sockets}
    if all(endpoint.for_nodes for endpoint in ready.values()):
        near = tuple(socket for socket, endpoint in ready.items() if node in endpoint.for_nodes)
        if near:
            return near
    if all(endpoint.for_zones for endpoint in ready.values()):
        near = tuple(socket for socket, endpoint in ready.items() if zone in endpoint.for_zones)
        if near:
            return near
    return sockets


def local_endpoints(endpoints: Mapping[str, Endpoint], node: str) -> Sockets:
    """Return the endpoints for traffic with policy Local: the usable endpoints on this node."""
    return usable({socket: endpoint for socket, endpoint in endpoints.items() if node and endpoint.node == node})
