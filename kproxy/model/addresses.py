"""IP addresses, CIDRs and `ip:port` strings in canonical form, as the kernel prints them. Pure."""

from __future__ import annotations

import re
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from kproxy.model.types import Family

_INET, _INET6 = int(AF_INET), int(AF_INET6)  # inet_pton is faster with a plain int than with the enum
_SPECIAL_RANGES = (
    ("unspecified", re.compile(r"0\.0\.0\.0|::")),
    ("loopback", re.compile(r"127\..*|::1")),
    ("link-local", re.compile(r"169\.254\..*|fe[89ab][0-9a-f]:.*")),
    ("link-local multicast", re.compile(r"224\.0\.0\..*|ff[0-9a-f]2:.*")),
)
_SPECIAL_PREFIXES = ("0.", "127.", "169.254.", "224.0.0.", "::", "fe8", "fe9", "fea", "feb", "ff")


def socket_text(address: str, port: int) -> str:
    """Return `ip:port`, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split_socket_text(text: str) -> tuple[str, int]:
    """Split the result of `socket_text` into address and port. Raises `ValueError` if the port is not a number."""
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


def family_of(address: str) -> Family:
    """Return the family of a canonical address or CIDR."""
    return Family.IPV6 if ":" in address else Family.IPV4


def special_range(address: str) -> str:
    """Return the special range that contains a canonical address, for example "loopback", or "" if there is none.

    The API server refuses endpoints and external IPs in these ranges: the unspecified address, 127.0.0.0/8 and ::1,
    169.254.0.0/16 and fe80::/10, and multicast with link-local scope (RFC 4291, RFC 5771).
    """
    if not address.startswith(_SPECIAL_PREFIXES):  # almost all addresses
        return ""
    return next((name for name, pattern in _SPECIAL_RANGES if pattern.fullmatch(address)), "")


def canonical_address(text: str) -> str | None:
    """Return an IP address in canonical form, or None if the text is not an IP address.

    IPv4 octets with leading zeros are read as decimal numbers, as in the Kubernetes API. An IPv4-mapped IPv6 address is
    returned as an IPv4 address.
    """
    family = _INET6 if ":" in text else _INET
    try:
        packed = inet_pton(family, text)
    except (OSError, ValueError):
        parts = text.split(".")
        trimmed = ".".join(part.lstrip("0") or "0" for part in parts)
        if len(parts) == 4 and all(part.isascii() and part.isdigit() for part in parts) and trimmed != text:
            return canonical_address(trimmed)
        return None
    if family == _INET:
        return text  # inet_pton accepts no other form
    if packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return inet_ntop(_INET, packed[12:])
    return inet_ntop(_INET6, packed)


def canonical_cidr(text: str) -> str | None:
    """Return a CIDR in canonical form with the host bits cleared, or None if the text is not a CIDR.

    Surrounding whitespace is allowed: the API accepts it in `loadBalancerSourceRanges`.
    """
    address, slash, length = text.strip().partition("/")
    base = canonical_address(address)
    if base is None or not slash or not (length.isascii() and length.isdigit() and len(length) < 4):
        return None
    family, bits = (AF_INET6, 128) if ":" in base else (AF_INET, 32)
    if int(length) > bits:
        return None
    prefix = int(length)
    number = int.from_bytes(inet_pton(family, base), "big") >> (bits - prefix) << (bits - prefix)
    return f"{inet_ntop(family, number.to_bytes(bits // 8, 'big'))}/{prefix}"
