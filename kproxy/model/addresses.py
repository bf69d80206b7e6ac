"""IP addresses, CIDRs and `ip:port` texts in the one form that the kernel prints. Pure."""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from kproxy.model.types import Family


def socket_text(address: str, port: int) -> str:
    """Return `ip:port`, with brackets around an IPv6 address: the name that endpoints go by."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def split_socket_text(text: str) -> tuple[str, int]:
    """Return address and port of what `socket_text` wrote."""
    address, _, port = text.rpartition(":")
    return address.strip("[]"), int(port)


def family_of(address: str) -> Family:
    """Return the family of a canonical address or CIDR."""
    return Family.IPV6 if ":" in address else Family.IPV4


def canonical_address(text: str) -> str | None:
    """Return an IP address in the form the kernel prints it, or None if it is none.

    Leading zeros in IPv4 are decimal (the Kubernetes API has always read them so).
    """
    family = AF_INET6 if ":" in text else AF_INET
    try:
        packed = inet_pton(family, text)
    except (OSError, ValueError):
        parts = text.split(".")
        trimmed = ".".join(part.lstrip("0") or "0" for part in parts)
        if len(parts) == 4 and all(part.isascii() and part.isdigit() for part in parts) and trimmed != text:
            return canonical_address(trimmed)
        return None
    if family == AF_INET6 and packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return inet_ntop(AF_INET, packed[12:])
    return inet_ntop(family, packed)


def canonical_cidr(text: str) -> str | None:
    """Return `address/length` with the host bits cleared, or None if the text is no CIDR.

    White space around it is allowed: the API accepts it in `loadBalancerSourceRanges`.
    """
    address, slash, length = text.strip().partition("/")
    base = canonical_address(address)
    if base is None or not slash or not (length.isascii() and length.isdigit() and len(length) < 4):
        return None
    family, bits = (AF_INET6, 128) if ":" in base else (AF_INET, 32)
    if int(length) > bits:
        return None
    keep = int(length)
    number = int.from_bytes(inet_pton(family, base), "big") >> (bits - keep) << (bits - keep)
    return f"{inet_ntop(family, number.to_bytes(bits // 8, 'big'))}/{keep}"
