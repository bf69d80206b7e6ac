"""Find and remove the virtual servers, interface and ipsets that kube-proxy's ipvs mode left on the node."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Container, Iterable

from msgspec import Struct

from kproxy.host.interfaces import addresses_by_interface, delete_interface, interface_index
from kproxy.ipvs.ipset import IpsetEntry, destroy_sets, set_entries, set_names
from kproxy.ipvs.virtual_servers import VirtualServer, delete_virtual_servers, virtual_servers

INTERFACE = "kube-ipvs0"
"""The dummy interface with the addresses of all Services. It makes the node accept packets to them as local."""
_NODE_PORT_SETS = {
    "KUBE-NODE-PORT-TCP": socket.IPPROTO_TCP,
    "KUBE-NODE-PORT-UDP": socket.IPPROTO_UDP,
    "KUBE-NODE-PORT-SCTP-HASH": socket.IPPROTO_SCTP,
}
"""The sets of the NodePorts of all traffic policies, with their protocol numbers."""
_ADDRESS_SETS = (
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-LOCAL",
)
"""The sets that together contain address, protocol and port of all virtual servers except those for NodePorts."""
_IPV4_SETS = (
    *_NODE_PORT_SETS,
    *_ADDRESS_SETS,
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOOP-BACK",
)


def _ipv6_name(name: str) -> str:
    """Return the name of the set for IPv6; the kernel limits names to 31 characters."""
    return name.replace("KUBE-", "KUBE-6-", 1)[:31]


SETS = frozenset({*_IPV4_SETS, *map(_ipv6_name, _IPV4_SETS)})
"""The names of all sets of ipvs mode. Other programs also have sets whose names begin with KUBE-."""
_NODE_PORT_PROTOCOLS = {**_NODE_PORT_SETS, **{_ipv6_name(name): number for name, number in _NODE_PORT_SETS.items()}}
_SETS_WITH_ADDRESSES = frozenset({*_ADDRESS_SETS, *map(_ipv6_name, _ADDRESS_SETS)})


class IpvsLeftovers(Struct, frozen=True):
    """The interface (its index, or 0 if it does not exist) and the sets (sorted names) that ipvs mode left behind."""

    interface: int
    sets: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.interface or self.sets)


class IpvsCleanupResult(Struct):
    """Short descriptions of the removed objects, and a one-line message about each problem.

    With `servers_remain`, virtual servers could not be removed. The interface and the sets then remain too, because
    they are needed to recognize these servers. A retry may succeed.
    """

    removed: list[str]
    problems: list[str]
    servers_remain: bool = False


def find_leftovers() -> IpvsLeftovers:
    """Find what ipvs mode left. If nothing is left, this takes only a few system calls. Raises `OSError`."""
    return IpvsLeftovers(interface_index(INTERFACE), tuple(sorted(SETS.intersection(set_names()))))


def remove_leftovers(leftovers: IpvsLeftovers) -> IpvsCleanupResult:
    """Remove the leftovers and their virtual servers. Rules that use the sets must be deleted first.

    A failed step is recorded in the result's `problems`; its `OSError` is not raised.
    """
    result = IpvsCleanupResult([], [])
    # The interface shows that kube-proxy may have virtual servers, and the sets show which ones. Remove both last.
    result.servers_remain = bool(leftovers.interface) and not _try(
        result, "IPVS virtual servers", lambda: _remove_servers(leftovers, result)
    )
    if result.servers_remain:
        return result
    if leftovers.sets:
        _try(result, "ipsets", lambda: _remove_sets(leftovers, result))
    if leftovers.interface:
        _try(result, f"the interface {INTERFACE}", lambda: _remove_interface(leftovers, result))
    return result


def kube_proxy_servers(
    servers: Iterable[VirtualServer], entries: Container[IpsetEntry], node_addresses: Container[str]
) -> list[VirtualServer]:
    """Return the virtual servers that kube-proxy created, according to the entries of its sets.

    An entry without an address is a NodePort on each of the node's addresses. The other virtual servers may belong to
    programs such as keepalived; kube-proxy's own cleanup deletes these too.
    """
    return [
        server
        for server in servers
        if IpsetEntry(server.address, server.protocol, server.port) in entries
        or (IpsetEntry("", server.protocol, server.port) in entries and server.address in node_addresses)
    ]


def _remove_servers(leftovers: IpvsLeftovers, result: IpvsCleanupResult) -> bool:
    """Return whether all virtual servers of kube-proxy have been removed."""
    existing = virtual_servers()
    if not existing:
        return True
    addresses = addresses_by_interface(socket.AF_UNSPEC)
    service_addresses = addresses.pop(leftovers.interface, frozenset())
    node_addresses = frozenset().union(*addresses.values())
    servers = kube_proxy_servers(existing, _server_entries(leftovers.sets), node_addresses)
    unknown = [server for server in existing if server.address in service_addresses and server not in servers]
    if unknown:
        result.problems.append(
            f"not removing {_count(unknown, 'IPVS virtual server')} (first: {unknown[0].address} port "
            f"{unknown[0].port}) on addresses of {INTERFACE}: not in any of kube-proxy's ipsets"
        )
    if not servers:
        return True
    errors = delete_virtual_servers(servers)
    if removed := [server for server in servers if server not in errors]:
        result.removed.append(_count(removed, "virtual server"))
    if errors:
        server, reason = next(iter(errors.items()))
        result.problems.append(
            f"cannot remove {_count(errors, 'IPVS virtual server')} (first: {server.address} port {server.port}): "
            f"{reason}"
        )
    return not errors


def _server_entries(names: Iterable[str]) -> set[IpsetEntry]:
    """Return the entries of sets that correspond to virtual servers."""
    entries: set[IpsetEntry] = set()
    for name in names:
        if name in _SETS_WITH_ADDRESSES:
            entries |= set_entries(name)
        elif name in _NODE_PORT_PROTOCOLS:
            entries |= {IpsetEntry("", _NODE_PORT_PROTOCOLS[name], entry.port) for entry in set_entries(name)}
    return entries


def _remove_interface(leftovers: IpvsLeftovers, result: IpvsCleanupResult) -> bool:
    delete_interface(leftovers.interface)
    result.removed.append(f"the interface {INTERFACE}")
    return True


def _remove_sets(leftovers: IpvsLeftovers, result: IpvsCleanupResult) -> bool:
    errors = destroy_sets(leftovers.sets)
    if removed := [name for name in leftovers.sets if name not in errors]:
        result.removed.append(_count(removed, "ipset"))
    by_reason: dict[str, list[str]] = {}
    for name, reason in errors.items():
        by_reason.setdefault(reason, []).append(name)
    result.problems += [f"cannot remove ipsets {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return not errors


def _count(objects: Collection[object], noun: str) -> str:
    return f"{len(objects)} {noun}{'s' * (len(objects) != 1)}"


def _try(result: IpvsCleanupResult, objects: str, step: Callable[[], bool]) -> bool:
    """Return what a step returns; if it raises `OSError`, record a problem with these objects and return False."""
    try:
        return step()
    except OSError as error:
        result.problems.append(f"cannot remove {objects}: {error.strerror}")
        return False
