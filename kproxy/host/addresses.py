"""The addresses of this machine's interfaces."""

from __future__ import annotations


def local_addresses() -> tuple[str, ...]:
    """Return the addresses of all interfaces, in the kernel's order, link-local IPv6 ones left out.

    Raises `OSError` if the kernel does not tell.
    """
    from pyroute2 import IPRoute  # noqa: PLC0415 - 11 MB that only nodePortAddresses needs

    with IPRoute() as route:
        # On a point-to-point link, IFA_ADDRESS is the other end's.
        found = [message.get("IFA_LOCAL") or message.get("IFA_ADDRESS") for message in route.get_addr()]
    return tuple(text for text in found if text and not text.lower().startswith("fe80:"))
