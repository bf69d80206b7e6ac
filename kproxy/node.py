"""What this node can do, found out once at start: IP families, iptables, nftables, counters."""

from __future__ import annotations

import logging
from pathlib import Path

from msgspec import Struct

from kproxy.host.mixup import other_variant_rules
from kproxy.host.nfacct import ensure_counters
from kproxy.host.run import CommandError
from kproxy.iptables.apply import Iptables
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.types import Family
from kproxy.nftables.apply import Commit
from kproxy.nftables.probe import UnsupportedError, way_to_commit

log = logging.getLogger(__name__)

IPV6_ADDRESSES = Path("/proc/thread-self/net/if_inet6")


class IptablesNode(Struct, frozen=True):
    """The iptables of each family that works here, and whether packets can be counted by nfacct."""

    programs: dict[Family, Iptables]
    accounting: bool


def discover_iptables() -> IptablesNode:
    """Look at what iptables mode needs. Raises `CommandError` if not even IPv4 works.

    A family that does not work is left out with a warning, as a kernel without IPv6 is ordinary.
    """
    found = {Family.IPV4: Iptables(Family.IPV4)}
    version = found[Family.IPV4].version()
    if _has_ipv6():
        second = Iptables(Family.IPV6)
        try:
            second.version()
        except CommandError as error:
            log.warning("IPv6 is left out: %s", error)
        else:
            found[Family.IPV6] = second
    if warning := other_variant_rules(ours_is_nft=version.nft):
        log.warning("%s", warning)
    return IptablesNode(found, _counters_exist())


def discover_nftables() -> dict[Family, Commit]:
    """Return by which way the kernel takes each family's transactions. Raises `UnsupportedError` if IPv4's by none.

    A family that does not work is left out with a warning.
    """
    ways = {Family.IPV4: way_to_commit(Family.IPV4)}
    if _has_ipv6():
        try:
            ways[Family.IPV6] = way_to_commit(Family.IPV6)
        except UnsupportedError as error:
            log.warning("IPv6 is left out: %s", error)
    return ways


def _has_ipv6() -> bool:
    if IPV6_ADDRESSES.exists():
        return True
    log.warning("IPv6 is left out: this kernel has none")
    return False


def _counters_exist() -> bool:
    try:
        ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER))
    except OSError as error:
        log.warning("nfacct counters are left out: %s", error.strerror)
        return False
    return True
