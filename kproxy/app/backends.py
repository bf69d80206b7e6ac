"""The proxy mode that works on this node, and the backend of each IP family."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Mapping
from functools import cache
from ipaddress import ip_address
from pathlib import Path

from kproxy.app.contexts import interface_warning, local_traffic_warning, make_context, node_port_warning
from kproxy.config import Config, node_name
from kproxy.config.types import PRIMARY
from kproxy.host.commands import CommandError, InconclusiveError
from kproxy.host.interfaces import local_addresses, own_addresses
from kproxy.host.nfacct import ensure_counters
from kproxy.host.process import has_net_admin
from kproxy.iptables.backend import MAX_TRANSACTION_RULES, UNLIMITED, IptablesBackend
from kproxy.iptables.base_rules import INVALID_COUNTER
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner, check_tables
from kproxy.iptables.variant import other_variant_warning
from kproxy.model.context import Context
from kproxy.model.delta import BASIC_KINDS, Kind
from kproxy.model.types import Family, Node, ServiceCIDR
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import Commit, NftTable, OwnGenerations
from kproxy.nftables.probe import NftablesUnsupportedError, choose_commit
from kproxy.sync.family import FamilySync

log = logging.getLogger(__name__)
IPV6_ADDRESSES = Path("/proc/thread-self/net/if_inet6")


def discover_iptables() -> dict[Family, IptablesRunner]:
    """Return the iptables of each family that works here.

    Raises `CommandError` if none works, or IPv4 does not and is needed.

    A family that the kernel refuses is left out with a warning: a kernel without IPv6, or without NAT for it, is
    ordinary. What may work a moment later, such as a program that hung, is no reason to leave anything out: it raises
    `InconclusiveError`.
    """
    found: dict[Family, IptablesRunner] = {}
    reasons: dict[Family, str] = {}
    for family in _families():
        iptables = IptablesRunner(family)
        try:
            check_tables(family, iptables.version())
        except InconclusiveError:
            raise
        except CommandError as error:
            reasons[family] = str(error)
        else:
            found[family] = iptables
    if (needed := _check_ipv4(reasons)) or not found:
        raise CommandError(_all_of(reasons, needed))
    _leave_out(reasons)
    version = next(iter(found.values())).version()
    if warning := other_variant_warning(uses_nft=version.nft):
        log.warning("%s", warning)
    return found


def discover_nftables() -> dict[Family, Commit]:
    """Return by which way the kernel takes each family's transactions.

    A family that does not work is left out with a warning.

    Raises `NftablesUnsupportedError` if none works, or IPv4 does
    not and is needed, and `InconclusiveError` as the other.
    """
    ways: dict[Family, Commit] = {}
    reasons: dict[Family, str] = {}
    for family in _families():
        try:
            ways[family] = choose_commit(family)
        except NftablesUnsupportedError as error:
            reasons[family] = str(error)
    if (needed := _check_ipv4(reasons)) or not ways:
        raise NftablesUnsupportedError(_all_of(reasons, needed))
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


class StartError(Exception):
    """kproxy cannot work here; the message says why on one line."""


def check_privileges() -> None:
    """Raise `StartError` unless this process may change the rules of its network namespace."""
    if not has_net_admin():
        raise StartError(
            "the capability CAP_NET_ADMIN over this network namespace is missing: run as root or give it to the process"
        )


def local_node_name(config: Config) -> str:
    """Return this node's name: `hostnameOverride`, or the machine's host name."""
    return node_name(config, socket.gethostname())


def watches_addresses(config: Config) -> bool:
    """Return whether rules depend on the addresses of this machine's interfaces."""
    return config.effective_node_port_addresses not in {(), (PRIMARY,)}


def watched_kinds(config: Config) -> tuple[Kind, ...]:
    """Return the kinds of objects that rules depend on."""
    return (*BASIC_KINDS, ServiceCIDR) if config.effective_mode == "nftables" else BASIC_KINDS


def choose_mode(config: Config) -> Config:
    """Return the configuration with a mode: one that leaves it open gets nftables if it works here, else iptables.

    Raises `StartError` if that cannot be told.
    """
    if config.mode:
        return config
    try:
        choose_commit(Family.IPV4)
    except NftablesUnsupportedError as error:
        log.warning("mode iptables, since nftables mode does not work here for IPv4: %s", error)
        return config.resolved("iptables")
    except InconclusiveError as error:
        raise StartError(f"cannot choose a mode: {error}") from None
    log.info("mode nftables, which works here")
    return config.resolved("nftables")


def make_families(config: Config, programs: list[IptablesRunner]) -> dict[Family, FamilySync]:
    """Return the way to the kernel for each family that works here. Raises `StartError` if none does.

    What can be stopped from another thread is added to `programs`. Interfaces of pods that are not there are logged.
    """
    if warning := interface_warning(config, [name for _, name in socket.if_nameindex()]):
        log.warning("%s", warning)
    if config.effective_mode == "iptables":
        return _iptables(config, programs)
    try:
        ways = discover_nftables()
    except (NftablesUnsupportedError, InconclusiveError) as error:
        raise StartError(f"nftables mode does not work here: {error}") from None
    own = OwnGenerations()
    return {family: _nftables(config, family, commit, own) for family, commit in ways.items()}


def _iptables(config: Config, programs: list[IptablesRunner]) -> dict[Family, FamilySync]:
    try:
        found = discover_iptables()
    except CommandError as error:
        raise StartError(f"iptables mode does not work here: {error}") from None
    families = {}
    counters = cache(make_counters)  # not before the first sync: a start that fails leaves nothing behind
    for family, iptables in found.items():
        version = iptables.version()
        log.info("%s: %s", family.value, version)
        programs.append(iptables)
        backend = IptablesBackend(
            iptables,
            max_transaction_rules=MAX_TRANSACTION_RULES if version.nft else UNLIMITED,
            dispatch_threshold=config.kproxy.iptables_dispatch_threshold,
            patching=version.supports_patching,
        )
        contexts = ContextFactory(config, family, accounting=counters, random_fully=version.random_fully)
        families[family] = FamilySync(backend, contexts.make)
    return families


def _nftables(config: Config, family: Family, commit: Commit, own: OwnGenerations) -> FamilySync:
    return FamilySync(
        NftablesBackend(NftTable(family, commit), own),
        ContextFactory(config, family, accounting=lambda: False, random_fully=True).make,
        large_cluster_endpoints=math.inf,  # elements cost the same however many there are
    )


class ContextFactory:
    """Makes the contexts of one family, and warns of what its settings cannot do on this node."""

    def __init__(self, config: Config, family: Family, *, accounting: Callable[[], bool], random_fully: bool) -> None:
        """`accounting` is asked before the first sync whether nfacct counters can be used."""
        self._config = config
        self._family = family
        self._accounting = accounting
        self._random_fully = random_fully
        self._warnings: tuple[str, ...] = ()

    def make(self, node: Node | None) -> Context:
        """Return the context for what is known of this Node, and of the machine's addresses."""
        config = self._config
        context = make_context(
            config,
            self._family,
            local_node_name(config),
            node,
            local_addresses() if watches_addresses(config) else (),
            accounting=self._accounting(),
            random_fully=self._random_fully,
        )
        warnings = (node_port_warning(config, node, context), local_traffic_warning(config, node, context))
        for warning in warnings:
            if warning and warning not in self._warnings:
                log.warning("%s", warning)
        self._warnings = warnings
        return context
