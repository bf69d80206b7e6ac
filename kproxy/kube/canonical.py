"""IP addresses and CIDRs as the API may write them, in the one form that the kernel prints. Pure."""

from __future__ import annotations

import socket


def canonical_address(text: str) -> str | None:
    """Return an IP address in the form the kernel prints it, or None if it is none.

    Leading zeros in IPv4 are decimal (the Kubernetes API has always read them so).
    """
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        packed = socket.inet_pton(family, text)
    except (OSError, ValueError):
        parts = text.split(".")
        trimmed = ".".join(part.lstrip("0") or "0" for part in parts)
        if len(parts) == 4 and all(part.isascii() and part.isdigit() for part in parts) and trimmed != text:
            return canonical_address(trimmed)
        return None
    if family == socket.AF_INET6 and packed.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    return socket.inet_ntop(family, packed)


def canonical_cidr(text: str) -> str | None:
    """Return `address/length` with the host bits cleared, or None if the text is no CIDR.

    White space around it is allowed: the API accepts it in `loadBalancerSourceRanges`.
    """
    address, slash, length = text.strip().partition("/")
    base = canonical_address(address)
    if base is None or not slash or not (length.isascii() and length.isdigit() and len(length) < 4):
        return None
    family, bits = (socket.AF_INET6, 128) if ":" in base else (socket.AF_INET, 32)
    if int(length) > bits:
        return None
    keep = int(length)
    number = int.from_bytes(socket.inet_pton(family, base), "big") >> (bits - keep) << (bits - keep)
    return f"{socket.inet_ntop(family, number.to_bytes(bits // 8, 'big'))}/{keep}"
