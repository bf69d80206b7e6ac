"""Find and remove the virtual servers, interface and ipsets that kube-proxy's ipvs mode left on the node."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Container, Iterable

from msgspec import Struct

from kproxy.host.interfaces import addresses_by_interface, delete_interface, interface_index
from kproxy.ipvs.ipset import IpsetEntry, destroy_sets, set_entries, set_names
from kproxy.ipvs.virtual_servers import VirtualServer, delete_virtual_servers, virtual_servers

INTERFACE = "kube-ipvs0"
"""The dummy interface that has the addresses of all Services. The node therefore accepts packets to these addresses as
local.
"""
_NODE_PORT_SETS = {
    "KUBE-NODE-PORT-TCP": socket.IPPROTO_TCP,
    "KUBE-NODE-PORT-UDP": socket.IPPROTO_UDP,
    "KUBE-NODE-PORT-SCTP-HASH": socket.IPPROTO_SCTP,
}
"""The sets that together contain all NodePorts, regardless of traffic policy, with their protocol numbers."""
_ADDRESS_SETS = (
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-LOCAL",
)
"""The sets that together contain the addresses, protocols and ports of all virtual servers except for NodePorts."""
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
    """Return the name of the IPv6 variant of a set. The kernel limits names to 31 characters."""
    return name.replace("KUBE-", "KUBE-6-", 1)[:31]


SETS = frozenset({*_IPV4_SETS, *map(_ipv6_name, _IPV4_SETS)})
"""The names of all sets of ipvs mode. The prefix KUBE- is not enough to recognize them: other programs use it, too."""
_NODE_PORT_PROTOCOLS = {**_NODE_PORT_SETS, **{_ipv6_name(name): number for name, number in _NODE_PORT_SETS.items()}}
_SETS_WITH_ADDRESSES = frozenset({*_ADDRESS_SETS, *map(_ipv6_name, _ADDRESS_SETS)})


class IpvsLeftovers(Struct, frozen=True):
    """The interface and the ipsets that ipvs mode left on the node.

    `interface` is the index of the interface, or 0 if it does not exist. `sets` are the sorted names of the ipsets.
    """

    interface: int
    sets: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.interface or self.sets)


class IpvsCleanupResult(Struct):
    """Short descriptions of the removed objects, and a one-line message about each problem.

    If `servers_remain` is true, some virtual servers could not be removed. In this case the interface and the ipsets
    remain too, because they are needed to recognize these servers. A retry may succeed.
    """

    removed: list[str]
    problems: list[str]
    servers_remain: bool = False


def find_leftovers() -> IpvsLeftovers:
    """Find the interface and the ipsets that ipvs mode left. Raises `OSError`.

    If there are none, this takes only a few system calls.
    """
    return IpvsLeftovers(interface_index(INTERFACE), tuple(sorted(SETS.intersection(set_names()))))


def remove_leftovers(leftovers: IpvsLeftovers) -> IpvsCleanupResult:
    """Remove the leftovers of ipvs mode. Rules that use the ipsets must be deleted beforehand.

    Virtual servers are removed only if the interface of ipvs mode exists.

    If a step fails with `OSError`, the error is added to the result's `problems` and not raised.
    """
    result = IpvsCleanupResult([], [])
    # Remove the interface and the ipsets last. The interface shows that kube-proxy may have left virtual servers, and
    # the ipsets show which virtual servers are kube-proxy's.
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
    """Return the virtual servers that kube-proxy created, according to the `entries` of its ipsets.

    An entry without an address stands for a NodePort on each of the node's addresses. Virtual servers without a
    matching entry may belong to programs such as keepalived. kube-proxy's own cleanup deletes all virtual servers.
    """
    return [
        server
        for server in servers
        if IpsetEntry(server.address, server.protocol, server.port) in entries
        or (IpsetEntry("", server.protocol, server.port) in entries and server.address in node_addresses)
    ]


def _remove_servers(leftovers: IpvsLeftovers, result: IpvsCleanupResult) -> bool:
    """Remove the virtual servers of kube-proxy; return whether all of them have been removed.

    A virtual server on one of the interface's addresses is kept, and recorded as a problem, if it is not in any of
    kube-proxy's ipsets.
    """
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
    """Return the virtual servers that the named ipsets contain, as ipset entries. Ignore ipsets for other purposes."""
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
    """Run a step and return its result. If it raises `OSError`, record a problem and return False.

    `objects` describes what the step removes.
    """
    try:
        return step()
    except OSError as error:
        result.problems.append(f"cannot remove {objects}: {error.strerror}")
        return False
