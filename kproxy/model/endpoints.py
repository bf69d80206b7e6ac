"""From EndpointSlices to the endpoints of one service port."""

from __future__ import annotations

from collections.abc import Iterable

from kproxy.model.types import Endpoint, EndpointSlice, Family


def socket_text(address: str, port: int) -> str:
    """Return `ip:port`, with brackets around an IPv6 address: the name that endpoints go by."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split_socket_text(text: str) -> tuple[str, int]:
    """Return address and port of what `socket_text` wrote."""
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


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
