"""The endpoints of one service port, and those that this node sends traffic to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kproxy.model.types import Endpoint, EndpointSlice, Family


def endpoints_by_socket(
    slices: Iterable[EndpointSlice], family: Family, port_name: str, protocol: str
) -> dict[str, Endpoint]:
    """Return the endpoints of one service port by their `ip:port`, in the order of that text.

    A slice's port belongs to the service port of the same name and protocol. While an endpoint moves
    from one slice to another both may list it: it is one endpoint, and the entry that can take more traffic
    (not terminating, then ready, then serving) speaks for it.
    """
    found: dict[str, Endpoint] = {}
    for each in slices:
        if each.family is not family:
            continue
        for port in each.ports:
            if port.name == port_name and port.protocol == protocol:
                _add(found, each.endpoints, port.port, six=family is Family.IPV6)
    return {text: found[text] for text in sorted(found)}


def _add(found: dict[str, Endpoint], endpoints: Iterable[Endpoint], port: int, *, six: bool) -> None:
    end = f"]:{port}" if six else f":{port}"
    for endpoint in endpoints:
        text = f"[{endpoint.address}{end}" if six else endpoint.address + end
        known = found.get(text)
        if known is None or _usefulness(endpoint) > _usefulness(known):
            found[text] = endpoint


def _usefulness(endpoint: Endpoint) -> tuple[bool, bool, bool]:
    return (not endpoint.terminating, endpoint.ready, endpoint.serving)


Sockets = tuple[str, ...]


def usable(endpoints: Mapping[str, Endpoint]) -> Sockets:
    """Return the ready endpoints or, if there are none, those that serve while they terminate (KEP-1669)."""
    ready = tuple([text for text, endpoint in endpoints.items() if endpoint.ready])
    return ready or tuple([text for text, endpoint in endpoints.items() if endpoint.serving and endpoint.terminating])


def serving(endpoints: Mapping[str, Endpoint]) -> Sockets:
    """Return the endpoints that answer, ready for new connections or not."""
    return tuple(text for text, endpoint in endpoints.items() if endpoint.ready or endpoint.serving)


def cluster_endpoints(endpoints: Mapping[str, Endpoint], node: str, zone: str) -> Sockets:
    """Return the endpoints for traffic of policy Cluster, hints honoured.

    Hints for nodes, then hints for zones (KEP-3015, KEP-2433), each only if every ready endpoint
    carries them and one is for this node or zone: hints that are incomplete or leave nothing are ignored.
    """
    first = next((endpoint for endpoint in endpoints.values() if endpoint.ready), None)
    if first is None or not (first.for_nodes or first.for_zones):
        return usable(endpoints)
    ready = {text: endpoint for text, endpoint in endpoints.items() if endpoint.ready}
    if all(endpoint.for_nodes for endpoint in ready.values()):
        near = tuple(text for text, endpoint in ready.items() if node in endpoint.for_nodes)
        if near:
            return near
    if all(endpoint.for_zones for endpoint in ready.values()):
        near = tuple(text for text, endpoint in ready.items() if zone in endpoint.for_zones)
        if near:
            return near
    return tuple(ready)


def local_endpoints(endpoints: Mapping[str, Endpoint], node: str) -> Sockets:
    """Return the endpoints for traffic of policy Local: the usable ones among those on this node."""
    return usable({text: endpoint for text, endpoint in endpoints.items() if node and endpoint.node == node})
