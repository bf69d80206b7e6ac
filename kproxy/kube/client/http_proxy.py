"""Choose the HTTP proxy for a server by the rules of Go's `net/http.ProxyFromEnvironment`. Pure.

The rules are from the documentation of golang.org/x/net/http/httpproxy. kube-proxy and kubectl apply them too, so an
environment variable has the same effect on kproxy as on kube-proxy and kubectl.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TypeAlias
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}
_IP: TypeAlias = IPv4Address | IPv6Address


def http_proxy_for(server: str, environment: Mapping[str, str]) -> str:
    """Return the URL of the proxy for `server`, or "" to connect directly. `server` is an `http` or `https` URL.

    The proxy for an `https` URL is the value of `HTTPS_PROXY`; for an `http` URL, it is the value of `HTTP_PROXY`. If
    one of these variables or `NO_PROXY` is unset or empty, the variable with the same name in lower case is used. A
    proxy without a scheme is an `http` proxy. Connections to `localhost`, to loopback addresses and to hosts that
    `NO_PROXY` lists never use a proxy. In a CGI environment (if `REQUEST_METHOD` is set), `http` URLs never use a
    proxy, because any client can set `HTTP_PROXY` with a `Proxy` request header. The result is also "" if `server`
    cannot be parsed.
    """
    try:
        parts = urlsplit(server)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        return ""  # not a URL: connecting to it will fail and report the problem
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

    An entry is `*` (every host), a CIDR, or an IP address or domain, which may be followed by a port.
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
        return host.endswith(name)  # `.example.com` does not match `example.com` itself
    return host == name or host.endswith(f".{name}")


def _split_port(entry: str) -> tuple[str, str]:
    """Split an entry into a host and a port. The port is "" if the entry has none.

    An IPv6 address must be in brackets if a port follows.
    """
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
    """Parse an IP address, ignoring its zone. Return None if the text is not an IP address.

    An IPv4-mapped IPv6 address is converted to the IPv4 address.
    """
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
