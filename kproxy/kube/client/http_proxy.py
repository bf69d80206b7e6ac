"""Choice of the HTTP proxy for a server, by the rules of Go's `net/http.ProxyFromEnvironment`. Pure.

Source: the documentation of golang.org/x/net/http/httpproxy. kube-proxy and kubectl apply the same rules, so the same
environment variables have the same effect on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeAlias
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}
_IP: TypeAlias = IPv4Address | IPv6Address


def http_proxy_for(server: str, environment: Mapping[str, str]) -> str:
    """Return the URL of the proxy to use for `server`, an `http` or `https` URL, or "" to connect directly.

    `HTTPS_PROXY` applies to `https` and `HTTP_PROXY` to `http`. Lower-case names apply if the upper-case ones are unset
    or empty. A proxy without a scheme is an `http` proxy. Connections to `localhost`, loopback addresses and hosts that
    `NO_PROXY` lists never use a proxy. In a CGI environment (`REQUEST_METHOD` is set), `HTTP_PROXY` is ignored, because
    any client can set it with a `Proxy` request header.
    """
    try:
        parts = urlsplit(server)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        return ""  # not a URL; the caller that connects reports it
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
    return any(_matches(entry.strip().lower(), host, address, port) for entry in no_proxy.split(","))


def _matches(entry: str, host: str, address: _IP | None, port: int) -> bool:
    """Return whether an entry of `NO_PROXY` matches a host.

    An entry is `*`, a CIDR, or an address or domain with an optional port.
    """
    if entry == "*":
        return True
    if "/" in entry:
        return address is not None and _contains(entry, address)
    name, entry_port = _split_port(entry)
    if not name or (entry_port and entry_port != str(port)):
        return False
    entry_address = _address(name)
    if entry_address is not None:
        return entry_address == address
    if name.startswith("*."):
        name = name[1:]
    if name.startswith("."):
        return host.endswith(name)  # `.example.com` does not match example.com itself
    return host == name or host.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, str]:
    """Split `host:port`, `[IPv6]:port` or `[IPv6]`. An IPv6 address without brackets has no port."""
    if entry.startswith("["):
        host, _, rest = entry[1:].partition("]")
        return host, rest.removeprefix(":")
    if entry.count(":") == 1:
        host, _, port = entry.partition(":")
        return host, port
    return entry, ""


def _contains(cidr: str, address: _IP) -> bool:
    try:
        network = ip_network(cidr, strict=False)
    except ValueError:
        return False
    return network.version == address.version and address in network


def _address(text: str) -> _IP | None:
    """Parse an IP address; unmap an IPv4-mapped one. Return None for any other text."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
