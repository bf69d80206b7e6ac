"""Which HTTP proxy leads to a server, as Go's `net/http.ProxyFromEnvironment` decides it. Pure.

Source: the documentation of golang.org/x/net/http/httpproxy. kube-proxy and kubectl follow the same rule, so one
environment means the same to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeAlias
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_IP: TypeAlias = IPv4Address | IPv6Address


def http_proxy_for(server: str, environment: Mapping[str, str]) -> str:
    """Return the URL of the proxy to use for `server`, an `http` or `https` URL, or "" to connect directly.

    `HTTPS_PROXY` applies to `https`, `HTTP_PROXY` to `http`; names in lower case count where those in upper case are
    unset or empty. A proxy without a scheme is an `http` one. `localhost`, loopback addresses and what `NO_PROXY` lists
    are always reached directly. In a CGI environment (`REQUEST_METHOD` is set) anybody may send a header that becomes
    `HTTP_PROXY`, so it does not count there.
    """
    try:
        parts = urlsplit(server)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        return ""  # not a URL, which whoever connects reports
    if parts.scheme == "http" and environment.get("REQUEST_METHOD"):
        return ""
    proxy = _variable(environment, f"{parts.scheme}_proxy").strip()
    if not proxy or _is_direct(parts.hostname or "", port, _variable(environment, "no_proxy")):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _variable(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name.upper(), "") or environment.get(name, "")


def _is_direct(host: str, port: int, no_proxy: str) -> bool:
    host = host.lower()
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_covers(entry.strip().lower(), host, address, port) for entry in no_proxy.split(","))


def _covers(entry: str, host: str, address: _IP | None, port: int) -> bool:
    """Return whether an entry of `NO_PROXY` (`*`, CIDR, address or domain, the latter two maybe with a port) holds."""
    if entry == "*":
        return True
    if "/" in entry:
        return address is not None and _holds(entry, address)
    name, entry_port = _split_port(entry)
    if not name or (entry_port and entry_port != str(port)):
        return False
    listed = _address(name)
    if listed is not None:
        return listed == address
    if name.startswith("*."):
        name = name[1:]
    if name.startswith("."):
        return host.endswith(name)  # `.example.com` is not example.com itself
    return host == name or host.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, str]:
    """Split `host:port`, `[IPv6]:port` or `[IPv6]`; an IPv6 address without brackets has no port."""
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        return host, rest.removeprefix(":")
    if entry.count(":") == 1:
        host, _, port = entry.partition(":")
        return host, port
    return entry, ""


def _holds(cidr: str, address: _IP) -> bool:
    try:
        network = ip_network(cidr, strict=False)
    except ValueError:
        return False
    return network.version == address.version and address in network


def _address(text: str) -> _IP | None:
    """Return an IP address, that within an IPv4-mapped one, or None if it is none."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found
