"""The way to the kernel of each IP family: backend and context, for this node and configuration."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable
from functools import cache

from kproxy.config import Config, node_name
from kproxy.config.types import PRIMARY
from kproxy.contexts import interface_warning, local_traffic_warning, make_context, node_port_warning
from kproxy.host.addresses import local_addresses
from kproxy.host.privileges import has_net_admin
from kproxy.host.run import CommandError, UndecidedError
from kproxy.iptables.apply import Iptables
from kproxy.iptables.backend import BLOCK_RULES, UNLIMITED, IptablesBackend
from kproxy.model.context import Context
from kproxy.model.delta import BASIC_KINDS, Kind
from kproxy.model.types import Family, Node, ServiceCIDR
from kproxy.nftables.apply import Commit, NftTable
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.generations import OwnChanges
from kproxy.nftables.probe import UnsupportedError, way_to_commit
from kproxy.node import discover_iptables, discover_nftables, make_counters
from kproxy.sync.family import FamilySync

log = logging.getLogger(__name__)


class StartError(Exception):
    """kproxy cannot work here; the message says why on one line."""


def check_privileges() -> None:
    """Raise `StartError` unless this process may change the rules of its network namespace."""
    if not has_net_admin():
        raise StartError(
            "the capability CAP_NET_ADMIN over this network namespace is missing: run as root or give it to the process"
        )


def this_node(config: Config) -> str:
    """Return this node's name: `hostnameOverride`, or the machine's host name."""
    return node_name(config, socket.gethostname())


def follows_addresses(config: Config) -> bool:
    """Return whether rules depend on the addresses of this machine's interfaces."""
    return config.node_port_addresses_in_force not in {(), (PRIMARY,)}


def kinds_followed(config: Config) -> tuple[Kind, ...]:
    """Return the kinds of objects that rules depend on."""
    return (*BASIC_KINDS, ServiceCIDR) if config.mode_in_force == "nftables" else BASIC_KINDS


def with_mode(config: Config) -> Config:
    """Return the configuration with a mode: one that leaves it open gets nftables if it works here, else iptables.

    Raises `StartError` if that cannot be told.
    """
    if config.mode:
        return config
    try:
        way_to_commit(Family.IPV4)
    except UnsupportedError as error:
        log.warning("mode iptables, since nftables mode does not work here for IPv4: %s", error)
        return config.resolved("iptables")
    except UndecidedError as error:
        raise StartError(f"cannot choose a mode: {error}") from None
    log.info("mode nftables, which works here")
    return config.resolved("nftables")


def make_families(config: Config, programs: list[Iptables]) -> dict[Family, FamilySync]:
    """Return the way to the kernel for each family that works here. Raises `StartError` if none does.

    What can be stopped from another thread is added to `programs`. Interfaces of pods that are not there are logged.
    """
    if warning := interface_warning(config, [name for _, name in socket.if_nameindex()]):
        log.warning("%s", warning)
    if config.mode_in_force == "iptables":
        return _iptables(config, programs)
    try:
        ways = discover_nftables()
    except (UnsupportedError, UndecidedError) as error:
        raise StartError(f"nftables mode does not work here: {error}") from None
    own = OwnChanges()
    return {family: _nftables(config, family, commit, own) for family, commit in ways.items()}


def _iptables(config: Config, programs: list[Iptables]) -> dict[Family, FamilySync]:
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
            block_rules=BLOCK_RULES if version.nft else UNLIMITED,
            dispatch_threshold=config.kproxy.iptables_dispatch_threshold,
            patching=version.finds_single_rules,
        )
        contexts = Contexts(config, family, accounting=counters, random_fully=version.random_fully)
        families[family] = FamilySync(backend, contexts.make)
    return families


def _nftables(config: Config, family: Family, commit: Commit, own: OwnChanges) -> FamilySync:
    return FamilySync(
        NftablesBackend(NftTable(family, commit), own),
        Contexts(config, family, accounting=lambda: False, random_fully=True).make,
        large_cluster_endpoints=math.inf,  # elements cost the same however many there are
    )


class Contexts:
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
            this_node(config),
            node,
            local_addresses() if follows_addresses(config) else (),
            accounting=self._accounting(),
            random_fully=self._random_fully,
        )
        warnings = (node_port_warning(config, node, context), local_traffic_warning(config, node, context))
        for warning in warnings:
            if warning and warning not in self._warnings:
                log.warning("%s", warning)
        self._warnings = warnings
        return context
