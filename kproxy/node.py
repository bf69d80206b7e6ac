"""What this node can do, found out once at start: IP families, iptables, nftables, counters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
    if (needed := _check_ipv4(reasons)) or not found:
        raise CommandError(_all_of(reasons, needed))
    _leave_out(reasons)
    version = next(iter(found.values())).version()
    if warning := other_variant_rules(ours_is_nft=version.nft):
        log.warning("%s", warning)
    return found


def discover_nftables() -> dict[Family, Commit]:
    """Return by which way the kernel takes each family's transactions.

    A family that does not work is left out with a warning. Raises `UnsupportedError` if none works, or IPv4 does not
    and is needed, and `UndecidedError` as the other.
    """
    ways: dict[Family, Commit] = {}
    reasons: dict[Family, str] = {}
    for family in _families():
        try:
            ways[family] = way_to_commit(family)
        except UnsupportedError as error:
            reasons[family] = str(error)
    if (needed := _check_ipv4(reasons)) or not ways:
        raise UnsupportedError(_all_of(reasons, needed))
    _leave_out(reasons)
    return ways


def _families() -> list[Family]:
    return [family for family in Family if family is not Family.IPV6 or _has_ipv6()]


def _check_ipv4(reasons: Mapping[Family, str]) -> str:
    """Return why this node cannot do without IPv4, if that is refused; "" if it is not, or can.

    On a machine with IPv4 addresses, Services might have no rule at all where everything looks well.
    """
    if Family.IPV4 not in reasons:
        return ""
    try:
        found = map(ip_address, own_addresses(Family.IPV4))
        address = next((each for each in sorted(found) if not (each.is_loopback or each.is_link_local)), None)
    except OSError as error:
        return f"IPv4 is needed as far as is known: this machine's addresses cannot be read: {error.strerror}"
    return f"IPv4 is needed, because this machine has the address {address}" if address else ""


def _leave_out(reasons: Mapping[Family, str]) -> None:
    for family, reason in reasons.items():
        log.warning("%s is left out: %s", family.value, reason)


def _all_of(reasons: Mapping[Family, str], needed: str = "") -> str:
    """Return one line about why each family does not work, and why one is `needed`."""
    families: dict[str, list[str]] = {}
    for family, reason in reasons.items():
        families.setdefault(reason, []).append(family.value)
    found = [f"{' and '.join(names)}: {reason}" for reason, names in families.items()]
    return "; ".join([*found, needed] if needed and Family.IPV6 not in reasons else found)


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
