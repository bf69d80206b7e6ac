"""Select the endpoints to which this node sends a service port's traffic, by policy, state and hints. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from kproxy.model.types import Endpoint, EndpointSlice, Family

Sockets: TypeAlias = tuple[str, ...]
"""Endpoints as `ip:port` strings."""


def endpoints_by_socket(
    slices: Iterable[EndpointSlice], family: Family, port_name: str, protocol: str
) -> dict[str, Endpoint]:
    """Return the endpoints of one service port by `ip:port`, sorted by that string.

    An EndpointSlice port belongs to the service port with the same name and protocol. Two slices may list the same
    endpoint while it moves from one to the other. The entry in the better state is used then: not terminating before
    terminating, then ready before not ready, then serving before not serving.
    """
    endpoints: dict[str, Endpoint] = {}
    for endpoint_slice in slices:
        if endpoint_slice.family is not family:
            continue
        for port in endpoint_slice.ports:
            if port.name == port_name and port.protocol == protocol:
                _add(endpoints, endpoint_slice.endpoints, port.port, ipv6=family is Family.IPV6)
    return {socket: endpoints[socket] for socket in sorted(endpoints)}


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
    """Return the ready endpoints or, if there are none, those that are serving and terminating (KEP-1669)."""
    ready = tuple([socket for socket, endpoint in endpoints.items() if endpoint.ready])
    return ready or tuple(
        [socket for socket, endpoint in endpoints.items() if endpoint.serving and endpoint.terminating]
    )


def serving(endpoints: Mapping[str, Endpoint]) -> Sockets:
    """Return the endpoints that are ready or serving."""
    return tuple(socket for socket, endpoint in endpoints.items() if endpoint.ready or endpoint.serving)


def cluster_endpoints(endpoints: Mapping[str, Endpoint], node: str, zone: str) -> Sockets:
    """Return the endpoints for traffic with policy Cluster, honoring topology hints.

    Hints for nodes (KEP-3015) come before hints for zones (KEP-2433). Either kind counts only if every ready endpoint
    has such a hint and at least one of the hints names this node or zone; otherwise the hints are ignored.
    """
    first = next((endpoint for endpoint in endpoints.values() if endpoint.ready), None)
    if first is None or not (first.for_nodes or first.for_zones):
        return usable(endpoints)
    ready = {socket: endpoint for socket, endpoint in endpoints.items() if endpoint.ready}
    if all(endpoint.for_nodes for endpoint in ready.values()):
        near = tuple(socket for socket, endpoint in ready.items() if node in endpoint.for_nodes)
        if near:
            return near
    if all(endpoint.for_zones for endpoint in ready.values()):
        near = tuple(socket for socket, endpoint in ready.items() if zone in endpoint.for_zones)
        if near:
            return near
    return tuple(ready)


def local_endpoints(endpoints: Mapping[str, Endpoint], node: str) -> Sockets:
    """Return the endpoints for traffic with policy Local: the usable ones on this node."""
    return usable({socket: endpoint for socket, endpoint in endpoints.items() if node and endpoint.node == node})
