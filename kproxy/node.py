"""What this node can do, found out once at start: IP families, iptables, nftables, counters."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from pathlib import Path

from kproxy.host.mixup import other_variant_rules
from kproxy.host.nfacct import ensure_counters
from kproxy.host.own_addresses import own_addresses
from kproxy.host.run import CommandError, UndecidedError
from kproxy.iptables.apply import Iptables
from kproxy.iptables.base import INVALID_COUNTER
from kproxy.iptables.probe import check_tables
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.model.types import Family
from kproxy.nftables.apply import Commit
from kproxy.nftables.probe import UnsupportedError, way_to_commit

log = logging.getLogger(__name__)

IPV6_ADDRESSES = Path("/proc/thread-self/net/if_inet6")


def discover_iptables() -> dict[Family, Iptables]:
    """Return the iptables of each family that works here.

    Raises `CommandError` if none works, or IPv4 does not and is needed.

    A family that the kernel refuses is left out with a warning: a kernel without IPv6, or without NAT for it, is
    ordinary. What may work a moment later, such as a program that hung, is no reason to leave anything out: it raises
    `UndecidedError`.
    """
    found: dict[Family, Iptables] = {}
    reasons: dict[Family, str] = {}
    for family in _families():
        iptables = Iptables(family)
        try:
            check_tables(family, iptables.version())
        except UndecidedError:
            raise
        except CommandError as error:
            reasons[family] = str(error)
        else:
            found[family] = iptables
    if not found or _is_needed(reasons):
        raise CommandError(_all_of(reasons))
    _leave_out(reasons)
    version = next(iter(found.values())).version()
    if warning := other_variant_rules(ours_is_nft=version.nft):
        log.warning("%s", warning)
    return found


def discover_nftables() -> dict[Family, Commit]:
    """Return by which way the kernel takes each family's transactions.

    A family that does not work is left out with a warning. Raises `UnsupportedError` if none works, or IPv4 does not
    and is needed.
    """
    ways: dict[Family, Commit] = {}
    reasons: dict[Family, str] = {}
    for family in _families():
        try:
            ways[family] = way_to_commit(family)
        except UnsupportedError as error:
            reasons[family] = str(error)
    if not ways or _is_needed(reasons):
        raise UnsupportedError(_all_of(reasons))
    _leave_out(reasons)
    return ways


def _families() -> list[Family]:
    return [family for family in Family if family is not Family.IPV6 or _has_ipv6()]


def _is_needed(refused: Collection[Family]) -> bool:
    """Return whether IPv4 is refused on a machine with IPv4 addresses, which might then have no rule at all."""
    return Family.IPV4 in refused and any(not ip_address(each).is_loopback for each in own_addresses(Family.IPV4))


def _leave_out(reasons: Mapping[Family, str]) -> None:
    for family, reason in reasons.items():
        log.warning("%s is left out: %s", family.value, reason)


def _all_of(reasons: Mapping[Family, str]) -> str:
    """Return one line about why each family does not work."""
    families: dict[str, list[str]] = {}
    for family, reason in reasons.items():
        families.setdefault(reason, []).append(family.value)
    return "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in families.items())


def _has_ipv6() -> bool:
    if IPV6_ADDRESSES.exists():
        return True
    log.warning("IPv6 is left out: this kernel has none")
    return False


def make_counters() -> bool:
    """Create the counters that rules name; return whether they are there. If not, a warning says why."""
    try:
        ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER))
    except OSError as error:
        log.warning("nfacct counters are left out: %s", error.strerror)
        return False
    return True
