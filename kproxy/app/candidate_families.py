"""Decide which IP families a node must or may support."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from kproxy.host.interfaces import own_addresses
from kproxy.model.types import Family

log = logging.getLogger(__name__)

IPV6_ADDRESSES = Path("/proc/thread-self/net/if_inet6")
"""This file exists if the kernel supports IPv6."""


def candidate_families() -> list[Family]:
    """Return the families that the kernel supports. Log a warning for a family that it does not support."""
    found = [family for family in Family if has_family(family)]
    for family in set(Family).difference(found):
        log.warning("skipping %s: the kernel does not support it", family.value)
    return found


def has_family(family: Family) -> bool:
    """Return whether the kernel supports a family."""
    return family is Family.IPV4 or IPV6_ADDRESSES.exists()


def why_ipv4_is_required(reasons: Mapping[Family, str]) -> str:
    """Return why IPv4 cannot be skipped on this node, or "" if IPv4 works or can be skipped.

    On a node with IPv4 addresses, skipping IPv4 would leave IPv4 Services without rules, although kproxy would appear
    healthy. Loopback and link-local addresses do not count.
    """
    if Family.IPV4 not in reasons:
        return ""
    try:
        found = map(ip_address, own_addresses(Family.IPV4))
        address = next((each for each in sorted(found) if not (each.is_loopback or each.is_link_local)), None)
    except OSError as error:
        return f"IPv4 cannot be skipped: the addresses of this node cannot be read: {error.strerror}"
    return f"IPv4 cannot be skipped: this node has the address {address}" if address else ""


def warn_of_skipped(reasons: Mapping[Family, str]) -> None:
    """Log the reason why each of these families is skipped."""
    for family, reason in reasons.items():
        log.warning("skipping %s: %s", family.value, reason)


def combined_reasons(reasons: Mapping[Family, str], ipv4_required: str) -> str:
    """Return one line that says why each family failed.

    If only IPv4 failed, and it cannot be skipped, the line also says why it cannot be skipped.
    """
    families: dict[str, list[str]] = {}
    for family, reason in reasons.items():
        families.setdefault(reason, []).append(family.value)
    parts = [f"{' and '.join(names)}: {reason}" for reason, names in families.items()]
    return "; ".join([*parts, ipv4_required] if ipv4_required and Family.IPV6 not in reasons else parts)
