"""What kube-proxy's ipvs mode leaves on a node beside its rules: virtual servers, an interface, sets of addresses."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable

from msgspec import Struct

from kproxy.host.interface import delete_interface, interface_addresses, interface_index
from kproxy.host.ipset import destroy_sets, set_names, set_ports
from kproxy.host.ipvs import VirtualServer, delete_virtual_servers, virtual_servers

INTERFACE = "kube-ipvs0"
"""The interface that has the addresses of all Services, so that packets to them are taken for the node's own."""

_NODE_PORT_SETS = {
    "KUBE-NODE-PORT-TCP": socket.IPPROTO_TCP,
    "KUBE-NODE-PORT-UDP": socket.IPPROTO_UDP,
    "KUBE-NODE-PORT-SCTP-HASH": socket.IPPROTO_SCTP,
}
"""The sets that NodePorts are in, of all traffic policies, and of which protocol they are."""

_SETS = (
    *_NODE_PORT_SETS,
    "KUBE-NODE-PORT-LOCAL-TCP",
    "KUBE-NODE-PORT-LOCAL-UDP",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH",
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-HEALTH-CHECK-NODE-PORT",
    "KUBE-IPVS-IPS",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-FW",
    "KUBE-LOAD-BALANCER-LOCAL",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR",
    "KUBE-LOAD-BALANCER-SOURCE-IP",
    "KUBE-LOOP-BACK",
)


def _of_ipv6(name: str) -> str:
    """Return the name of IPv6's set, which is cut at the 31 characters that a set's name may have."""
    return name.replace("KUBE-", "KUBE-6-", 1)[:31]


SETS = frozenset({*_SETS, *map(_of_ipv6, _SETS)})
"""The names of all sets. Other programs have sets that begin with KUBE- as well."""

_PROTOCOL_OF = {**_NODE_PORT_SETS, **{_of_ipv6(name): number for name, number in _NODE_PORT_SETS.items()}}


class IpvsLeftovers(Struct, frozen=True):
    """What was found: the index of the interface (0: none), and sets by their names, sorted."""

    interface: int
    sets: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.interface or self.sets)


class Removal(Struct):
    """What was removed, in a few words each, and for what stays one line that says why."""

    removed: list[str]
    problems: list[str]


def find() -> IpvsLeftovers:
    """Look for what ipvs mode left; where there is nothing, that is some system calls. Raises `OSError`."""
    return IpvsLeftovers(interface_index(INTERFACE), tuple(sorted(SETS.intersection(set_names()))))


def remove(found: IpvsLeftovers) -> Removal:
    """Remove what was found, and the virtual servers that go with it. No rule may use the sets any more."""
    done = Removal([], [])
    if found.interface:
        _try(done, "virtual servers of IPVS", lambda: _remove_servers(found, done))
        _try(done, f"the interface {INTERFACE}", lambda: _remove_interface(found, done))
    if found.sets:
        _try(done, "ipsets", lambda: _remove_sets(found, done))
    return done


def theirs(
    servers: Iterable[VirtualServer], addresses: Collection[str], node_ports: Collection[tuple[int, int]]
) -> list[VirtualServer]:
    """Return the virtual servers that are kube-proxy's: for a Service's address, or a NodePort (protocol, port).

    Others may be there of keepalived, for one. kube-proxy's own clean-up does not make the difference.
    """
    return [server for server in servers if server.address in addresses or (server.protocol, server.port) in node_ports]


def _remove_servers(found: IpvsLeftovers, done: Removal) -> None:
    servers = theirs(virtual_servers(), interface_addresses(found.interface), _node_ports(found.sets))
    if not servers:
        return
    refused = delete_virtual_servers(servers)
    _count(done, len(servers) - len(refused), "virtual server")
    if refused:
        server, reason = next(iter(refused.items()))
        done.problems.append(
            f"{len(refused)} virtual servers of IPVS cannot be removed, such as {server.address} "
            f"port {server.port}: {reason}"
        )


def _node_ports(names: Iterable[str]) -> set[tuple[int, int]]:
    return {(_PROTOCOL_OF[name], port) for name in names if name in _PROTOCOL_OF for _, port in set_ports(name) if port}


def _remove_interface(found: IpvsLeftovers, done: Removal) -> None:
    delete_interface(found.interface)
    done.removed.append(f"the interface {INTERFACE}")


def _remove_sets(found: IpvsLeftovers, done: Removal) -> None:
    refused = destroy_sets(found.sets)
    _count(done, len(found.sets) - len(refused), "ipset")
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    done.problems += [f"ipsets {', '.join(names)} cannot be removed: {reason}" for reason, names in reasons.items()]


def _count(done: Removal, number: int, what: str) -> None:
    if number:
        done.removed.append(f"{number} {what}{'s' * (number != 1)}")


def _try(done: Removal, what: str, step: Callable[[], None]) -> None:
    try:
        step()
    except OSError as error:
        done.problems.append(f"{what} cannot be removed: {error.strerror}")
