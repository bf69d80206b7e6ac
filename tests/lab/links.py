"""The links, addresses and routes of the lab: all its rtnetlink requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from tests.lab.namespace import Namespace
from tests.lab.waiting import wait_until

NEAR_END, FAR_END = "fe80::1", "fe80::2"
"""A router without a link-local address cannot resolve its IPv6 neighbors (RFC 4861, 7.2.2)."""

GATEWAYS = {4: "169.254.1.1", 6: NEAR_END}
"""The default gateways of every host: the hub's end of its link. All links use the same addresses."""

LOOPBACK = 1
IFA_F_NODAD = 0x02
RTN_LOCAL = 2
SCOPE_LINK = 253
IFNAMSIZ = 15


def version_of(address: str) -> int:
    """Return 4 or 6."""
    return 6 if ":" in address else 4


def configure(namespace: Namespace, *, forwards: bool) -> None:
    """Bring up lo and set the sysctls that differ between machines.

    A new namespace copies the IPv4 settings of the host, which may filter or redirect. The rate limit of ICMP errors
    is off, so that frequent rejections do not turn into timeouts.
    """
    namespace.sysctl(
        ipv4__ip_forward=int(forwards),
        ipv4__icmp_ratelimit=0,
        ipv4__conf__all__rp_filter=0,
        ipv4__conf__default__rp_filter=0,
        ipv4__conf__all__send_redirects=0,
        ipv4__conf__default__send_redirects=0,
        ipv4__conf__all__accept_redirects=0,
        ipv4__conf__default__accept_redirects=0,
        ipv6__icmp__ratelimit=0,
        ipv6__conf__all__disable_ipv6=0,
        ipv6__conf__all__forwarding=int(forwards),
        ipv6__conf__default__accept_redirects=0,
        ipv6__conf__default__accept_ra=0,
        ipv6__conf__default__addr_gen_mode=1,
    )
    _inside(namespace, lambda ip: ip.link("set", index=LOOPBACK, state="up"))


def connect(left: Namespace, left_addresses: Sequence[str], right: Namespace, right_addresses: Sequence[str]) -> None:
    """Link two namespaces as neighbors in one subnet, with `eth0` at both ends."""
    _inside(left, lambda ip: _add_addresses(ip, _add_link(ip, "eth0", right), left_addresses, {4: 24, 6: 64}))
    _inside(right, lambda ip: _add_addresses(ip, _set_up(ip, "eth0", FAR_END), right_addresses, {4: 24, 6: 64}))


def attach(hub: Namespace, sources: dict[int, str], leaf: Namespace, addresses: Sequence[str]) -> None:
    """Link a host to its hub point to point: one route per address towards the host, a default route towards the hub.

    `sources` are the hub's own addresses by IP version, used as source addresses towards the host. The gateway
    address has link scope, so that masquerading picks one of `sources` too.
    """

    def on_hub(ip: Any) -> None:
        link = _add_link(ip, leaf.name[:IFNAMSIZ], leaf)
        ip.addr("add", index=link, address=GATEWAYS[4], prefixlen=32, scope=SCOPE_LINK)
        for address in addresses:
            ip.route("add", dst=_host_prefix(address), oif=link, prefsrc=sources[version_of(address)])

    def on_leaf(ip: Any) -> None:
        link = _set_up(ip, "eth0", FAR_END)
        _add_addresses(ip, link, addresses, {4: 32, 6: 128})
        ip.route("add", dst=f"{GATEWAYS[4]}/32", oif=link, scope=SCOPE_LINK)
        for gateway in GATEWAYS.values():
            ip.route("add", dst=_default_prefix(gateway), gateway=gateway, oif=link)

    _inside(hub, on_hub)
    _inside(leaf, on_leaf)


def route_default(namespace: Namespace, gateways: Sequence[str]) -> None:
    """Add default routes through these neighbors, one per IP version."""

    def add(ip: Any) -> None:
        for gateway in gateways:
            ip.route("add", dst=_default_prefix(gateway), gateway=gateway)

    _inside(namespace, add)


def route(namespace: Namespace, addresses: Sequence[str], gateways: dict[int, str]) -> None:
    """Add a route for each address through the neighbor of its IP version."""

    def add(ip: Any) -> None:
        for address in addresses:
            ip.route("add", dst=_host_prefix(address), gateway=gateways[version_of(address)])

    _inside(namespace, add)


def add_addresses(namespace: Namespace, interface: str, *addresses: str) -> None:
    """Add addresses with their prefix lengths, such as `192.0.2.5/32`. They accept packets when this returns."""

    def add(ip: Any) -> None:
        (link,) = ip.link_lookup(ifname=interface)
        for each in addresses:
            address, _, length = each.partition("/")
            _add_addresses(ip, link, [address], {version_of(address): int(length)})

    _inside(namespace, add)


def _inside(namespace: Namespace, change: Callable[[Any], object]) -> None:
    def apply() -> None:
        with IPRoute() as ip:
            change(ip)

    namespace.call(apply)


def _add_link(ip: Any, name: str, peer: Namespace) -> int:
    """Add a veth pair whose other end is `eth0` of the peer; return the index of this end."""
    ip.link("add", ifname=name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": peer.fd})
    return _set_up(ip, name, NEAR_END)


def _set_up(ip: Any, name: str, link_local: str) -> int:
    index = int(ip.link_lookup(ifname=name)[0])
    ip.link("set", index=index, state="up")
    ip.addr("add", index=index, address=link_local, prefixlen=64, flags=IFA_F_NODAD)
    return index


def _add_addresses(ip: Any, link: int, addresses: Sequence[str], lengths: dict[int, int]) -> None:
    for address in addresses:
        version = version_of(address)
        flags = {"flags": IFA_F_NODAD} if version == 6 else {}
        ip.addr("add", index=link, address=address, prefixlen=lengths[version], **flags)
    # The kernel adds the local route of an IPv6 address from a work queue. Until then the address is unreachable.
    for address in addresses:
        wait_until(partial(_has_local_route, ip, address), f"the local route of {address}")


def _has_local_route(ip: Any, address: str) -> bool:
    try:
        return any(found["type"] == RTN_LOCAL for found in ip.route("get", dst=address))
    except NetlinkError:
        return False


def _host_prefix(address: str) -> str:
    return f"{address}/128" if version_of(address) == 6 else f"{address}/32"


def _default_prefix(gateway: str) -> str:
    return "::/0" if version_of(gateway) == 6 else "0.0.0.0/0"
