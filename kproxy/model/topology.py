"""Which of a service port's endpoints this node sends traffic to."""

from __future__ import annotations

from collections.abc import Mapping

from kproxy.model.types import Endpoint

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
