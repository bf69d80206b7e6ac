"""What kube-proxy's ipvs mode leaves on a node beside its rules: virtual servers, an interface, sets of addresses."""

from __future__ import annotations

import socket
from collections.abc import Callable, Container, Iterable

from msgspec import Struct

from kproxy.host.interfaces import addresses_by_interface, delete_interface, interface_index
from kproxy.ipvs.ipset import IpsetEntry, destroy_sets, set_entries, set_names
from kproxy.ipvs.virtual_servers import VirtualServer, delete_virtual_servers, virtual_servers

INTERFACE = "kube-ipvs0"
"""The interface that has the addresses of all Services, so that packets to them are taken for the node's own."""
_NODE_PORT_SETS = {
    "KUBE-NODE-PORT-TCP": socket.IPPROTO_TCP,
    "KUBE-NODE-PORT-UDP": socket.IPPROTO_UDP,
    "KUBE-NODE-PORT-SCTP-HASH": socket.IPPROTO_SCTP,
}
"""The sets that NodePorts are in, of all traffic policies, and of which protocol they are."""
_ADDRESS_SETS = (
    "KUBE-CLUSTER-IP",
    "KUBE-EXTERNAL-IP",
    "KUBE-EXTERNAL-IP-LOCAL",
    "KUBE-LOAD-BALANCER",
    "KUBE-LOAD-BALANCER-LOCAL",
)
"""The sets that together hold address, protocol and port of every virtual server that is not for a NodePort."""
_SETS = (
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


def _of_ipv6(name: str) -> str:
    """Return the name of IPv6's set, which is cut at the 31 characters that a set's name may have."""
    return name.replace("KUBE-", "KUBE-6-", 1)[:31]


SETS = frozenset({*_SETS, *map(_of_ipv6, _SETS)})
"""The names of all sets. Other programs have sets that begin with KUBE- as well."""
_PROTOCOL_OF = {**_NODE_PORT_SETS, **{_of_ipv6(name): number for name, number in _NODE_PORT_SETS.items()}}
_WITH_ADDRESSES = frozenset({*_ADDRESS_SETS, *map(_of_ipv6, _ADDRESS_SETS)})


class IpvsLeftovers(Struct, frozen=True):
    """What was found: the index of the interface (0: none), and sets by their names, sorted."""

    interface: int
    sets: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.interface or self.sets)


class IpvsCleanupResult(Struct):
    """What was removed, in a few words each, and for what stays one line that says why.

    `unfinished` says that virtual servers stay, and so does all that tells which they are: to try again may help.
    """

    removed: list[str]
    problems: list[str]
    unfinished: bool = False


def find() -> IpvsLeftovers:
    """Look for what ipvs mode left; where there is nothing, that is some system calls. Raises `OSError`."""
    return IpvsLeftovers(interface_index(INTERFACE), tuple(sorted(SETS.intersection(set_names()))))


def remove(found: IpvsLeftovers) -> IpvsCleanupResult:
    """Remove what was found, and the virtual servers that go with it. No rule may use the sets any more."""
    done = IpvsCleanupResult([], [])
    # Sets tell which virtual servers are kube-proxy's, and the interface that there may be some: they go last.
    done.unfinished = bool(found.interface) and not _try(
        done, "virtual servers of IPVS", lambda: _remove_servers(found, done)
    )
    if done.unfinished:
        return done
    if found.sets:
        _try(done, "ipsets", lambda: _remove_sets(found, done))
    if found.interface:
        _try(done, f"the interface {INTERFACE}", lambda: _remove_interface(found, done))
    return done


def theirs(
    servers: Iterable[VirtualServer], entries: Container[IpsetEntry], own: Container[str]
) -> list[VirtualServer]:
    """Return the virtual servers that are kube-proxy's, going by the entries of its sets and the node's own addresses.

    An entry without an address is a NodePort, and stands for the node's own addresses. Virtual servers of keepalived,
    for one, may be there too. kube-proxy's own clean-up does not make the difference.
    """
    return [
        server
        for server in servers
        if IpsetEntry(server.address, server.protocol, server.port) in entries
        or (IpsetEntry("", server.protocol, server.port) in entries and server.address in own)
    ]


def _remove_servers(found: IpvsLeftovers, done: IpvsCleanupResult) -> bool:
    """Return whether all of kube-proxy's virtual servers are gone."""
    present = virtual_servers()
    if not present:
        return True
    addresses = addresses_by_interface(socket.AF_UNSPEC)
    services = addresses.pop(found.interface, frozenset())
    servers = theirs(present, _entries(found.sets), frozenset().union(*addresses.values()))
    unnamed = [each for each in present if each.address in services and each not in servers]
    if unnamed:
        done.problems.append(
            f"{len(unnamed)} virtual servers of IPVS stay, such as {unnamed[0].address} port {unnamed[0].port}: they "
            f"are at addresses of {INTERFACE}, but in no ipset of kube-proxy's"
        )
    if not servers:
        return True
    refused = delete_virtual_servers(servers)
    _count(done, len(servers) - len(refused), "virtual server")
    if refused:
        server, reason = next(iter(refused.items()))
        done.problems.append(
            f"{len(refused)} virtual servers of IPVS cannot be removed, such as {server.address} "
            f"port {server.port}: {reason}"
        )
    return not refused


def _entries(names: Iterable[str]) -> set[IpsetEntry]:
    """Return what sets hold that tell of virtual servers."""
    found: set[IpsetEntry] = set()
    for name in names:
        if name in _WITH_ADDRESSES:
            found |= set_entries(name)
        elif name in _PROTOCOL_OF:
            found |= {IpsetEntry("", _PROTOCOL_OF[name], entry.port) for entry in set_entries(name)}
    return found


def _remove_interface(found: IpvsLeftovers, done: IpvsCleanupResult) -> bool:
    delete_interface(found.interface)
    done.removed.append(f"the interface {INTERFACE}")
    return True


def _remove_sets(found: IpvsLeftovers, done: IpvsCleanupResult) -> bool:
    refused = destroy_sets(found.sets)
    _count(done, len(found.sets) - len(refused), "ipset")
    reasons: dict[str, list[str]] = {}
    for name, reason in refused.items():
        reasons.setdefault(reason, []).append(name)
    done.problems += [f"ipsets {', '.join(names)} cannot be removed: {reason}" for reason, names in reasons.items()]
    return not refused


def _count(done: IpvsCleanupResult, number: int, what: str) -> None:
    if number:
        done.removed.append(f"{number} {what}{'s' * (number != 1)}")


def _try(done: IpvsCleanupResult, what: str, step: Callable[[], bool]) -> bool:
    try:
        return step()
    except OSError as error:
        done.problems.append(f"{what} cannot be removed: {error.strerror}")
        return False
