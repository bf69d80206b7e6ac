"""Choose the proxy mode and build the backend of each IP family that works on this node."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from kproxy.app.family_contexts import interface_warning, local_traffic_warning, make_context
from kproxy.app.foreign_chains import WatchfulBackend
from kproxy.app.localhost_node_ports import wants_localhost_proxy
from kproxy.app.node_port_addresses import node_port_warning
from kproxy.config import Config, node_name
from kproxy.config.types import PRIMARY
from kproxy.host.blocking_chains import blocking_chains
from kproxy.host.commands import CommandError, InconclusiveError
from kproxy.host.interfaces import local_addresses, own_addresses
from kproxy.host.nf_tables import current_generation
from kproxy.host.nfacct import ensure_counters
from kproxy.host.process import has_net_admin
from kproxy.iptables.backend import MAX_TRANSACTION_RULES, IptablesBackend
from kproxy.iptables.base_rules import INVALID_COUNTER
from kproxy.iptables.diff import UNLIMITED
from kproxy.iptables.foreign_changes import GenerationCounter
from kproxy.iptables.render import LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner, check_tables
from kproxy.iptables.save_restore import TABLES
from kproxy.iptables.variant import other_variant_warning
from kproxy.model.context import Context
from kproxy.model.delta import BASIC_KINDS, Kind
from kproxy.model.drift import CommitAuthor
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family, Node, ServiceCIDR
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, NftTable, OwnGenerations
from kproxy.nftables.probe import NftablesUnsupportedError, choose_commit, matches_sockets
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import Backend, FamilySync

if TYPE_CHECKING:
    from kproxy.app.localhost_listeners import Listeners

log = logging.getLogger(__name__)

IPV6_ADDRESSES = Path("/proc/thread-self/net/if_inet6")
"""This file exists if the kernel supports IPv6."""


class StartError(Exception):
    """kproxy cannot run on this node. The message gives the reason on one line."""


def check_privileges() -> None:
    """Raise `StartError` unless this process may change the rules of its network namespace."""
    if not has_net_admin():
        raise StartError(
            "missing capability CAP_NET_ADMIN in this network namespace: run as root or grant it to the process"
        )


def local_node_name(config: Config) -> str:
    """Return this node's name: `hostnameOverride`, or else the host name."""
    return node_name(config, socket.gethostname())


def watches_addresses(config: Config) -> bool:
    """Return whether the rules depend on the addresses of the node's interfaces."""
    return config.effective_node_port_addresses not in {(), (PRIMARY,)}


def watched_kinds(config: Config) -> tuple[Kind, ...]:
    """Return the kinds of objects that the rules depend on."""
    return (*BASIC_KINDS, ServiceCIDR) if config.effective_mode == "nftables" else BASIC_KINDS


def choose_mode(config: Config) -> Config:
    """Return the configuration with the proxy mode to use.

    `mode: ""` becomes nftables if nftables mode works for IPv4 on this node, otherwise iptables.

    Raises `StartError` if it cannot be determined whether nftables mode works.
    """
    if config.mode:
        return config
    try:
        choose_commit(Family.IPV4)
    except NftablesUnsupportedError as error:
        log.warning("using iptables mode: nftables mode does not work on this node for IPv4: %s", error)
        return config.resolved("iptables")
    except InconclusiveError as error:
        raise StartError(f"cannot choose a proxy mode: {error}") from None
    log.info("using nftables mode, which this node supports")
    return config.resolved("nftables")


class OwnCommits:
    """The nf_tables tables that kproxy programs, and what distinguishes kproxy's commits from those of others.

    `generations` contains only the commits that kproxy makes itself, without a program.
    """

    def __init__(self) -> None:
        self.tables: list[tuple[Family, str]] = []
        self.generations = OwnGenerations()
        self._owns: list[tuple[Callable[[int], bool], Callable[[CommitAuthor], bool]]] = []

    def add(
        self,
        tables: Iterable[tuple[Family, str]],
        owns: Callable[[int], bool],
        confirms: Callable[[CommitAuthor], bool],
    ) -> None:
        """Add tables. `owns` returns whether commits with a netlink port ID are made by kproxy.

        If it returns True, `confirms` returns whether a certain commit was made by kproxy.
        """
        self.tables += tables
        self._owns.append((owns, confirms))

    def owns(self, port: int) -> bool:
        """Return whether a commit with this netlink port ID was made by kproxy, or by a program that kproxy ran."""
        return any(owns(port) for owns, _ in self._owns)

    def confirms(self, commit: CommitAuthor) -> bool:
        """Return whether a commit was made by kproxy, if `owns` has returned True for its netlink port ID."""
        # The program may be unknown by now, if it is a child process of a program that kproxy ran.
        candidates = [confirms for owns, confirms in self._owns if owns(commit.port)]
        return any(confirms(commit) for confirms in candidates or [each for _, each in self._owns])


def make_families(
    config: Config,
    runners: list[IptablesRunner],
    own: OwnCommits | None = None,
    on_progress: Callable[[Family], object] = lambda _: None,
    listeners: Listeners | None = None,
) -> dict[Family, FamilySync]:
    """Build the `FamilySync` of each IP family that works on this node. Raises `StartError` if none works.

    In iptables mode, appends the iptables runners to `runners`, so that another thread can stop them. Adds to `own`
    what is needed to watch the tables. While a sync of a family is running, `on_progress` is called each time the
    kernel or iptables has accepted a part of it. `listeners` serves NodePorts on loopback addresses. Logs a warning if
    no interface of the node matches `detectLocal`.
    """
    own = own or OwnCommits()
    if warning := interface_warning(config, [name for _, name in socket.if_nameindex()]):
        log.warning("%s", warning)
    if config.effective_mode == "iptables":
        return _iptables_families(config, runners, own, on_progress)
    return _nftables_families(config, own, on_progress, listeners)


def _iptables_families(
    config: Config, runners: list[IptablesRunner], own: OwnCommits, on_progress: Callable[[Family], object]
) -> dict[Family, FamilySync]:
    try:
        found = discover_iptables(on_progress)
    except CommandError as error:
        raise StartError(f"iptables mode does not work on this node: {error}") from None
    families = {}
    counters = cache(ensure_packet_counters)  # runs at the first sync: a failed start leaves no counters behind
    for family, iptables in found.items():
        version = iptables.version()
        log.info("%s: %s", family.value, version)
        runners.append(iptables)
        if version.nft:
            own.add([(family, table) for table in TABLES], iptables.has_run, iptables.has_committed)
        backend = IptablesBackend(
            iptables,
            max_transaction_rules=MAX_TRANSACTION_RULES if version.nft else UNLIMITED,
            dispatch_threshold=config.kproxy.iptables_dispatch_threshold,
            patching=version.supports_patching,
        )
        contexts = ContextFactory(config, family, accounting=counters, random_fully=version.random_fully)
        families[family] = FamilySync(_watchful(backend, family), contexts.make)
    return families


def _nftables_families(
    config: Config, own: OwnCommits, on_progress: Callable[[Family], object], listeners: Listeners | None
) -> dict[Family, FamilySync]:
    try:
        commits = discover_nftables()
    except (NftablesUnsupportedError, InconclusiveError) as error:
        raise StartError(f"nftables mode does not work on this node: {error}") from None
    for family, commit in commits.items():
        own.add([(family, names.TABLE)], commit.has_made_commits, commit.is_author)
    return {
        family: FamilySync(
            _watchful(
                _listening(
                    NftablesBackend(
                        NftTable(family, _reporting(commit, partial(on_progress, family))), own.generations
                    ),
                    family,
                    listeners if wants_localhost_proxy(config, family) else None,
                ),
                family,
                names.TABLE,
            ),
            ContextFactory(
                config, family, accounting=lambda: False, random_fully=True, has_proxy=listeners is not None
            ).make,
            large_cluster_endpoints=math.inf,  # `large_cluster` changes nothing in nftables mode
        )
        for family, commit in commits.items()
    }


def _listening(backend: Backend, family: Family, listeners: Listeners | None) -> Backend:
    if listeners is None:
        return backend
    from kproxy.app.localhost_listeners import ListeningBackend  # noqa: PLC0415 - rarely used

    return ListeningBackend(backend, family, listeners)


def _watchful(backend: Backend, family: Family, *own_tables: str) -> WatchfulBackend:
    return WatchfulBackend(backend, partial(blocking_chains, family, own_tables), current_generation)


def _reporting(commit: Commit, on_progress: Callable[[], object]) -> Commit:
    """Return a `Commit` that calls `on_progress` after each transaction that the kernel has accepted."""

    def commit_and_report(transaction: Transaction, generation: int | None = None, /) -> None:
        commit(transaction, generation)
        on_progress()

    return commit_and_report


class ContextFactory:
    """Makes the contexts of one family and warns about settings that this node cannot satisfy."""

    def __init__(
        self,
        config: Config,
        family: Family,
        *,
        accounting: Callable[[], bool],
        random_fully: bool,
        has_proxy: bool = False,
    ) -> None:
        """`accounting` returns whether nfacct counters are available. It is called for each context.

        `has_proxy` is true if this process can serve NodePorts on loopback addresses in nftables mode.
        """
        self._config = config
        self._family = family
        self._accounting = accounting
        self._random_fully = random_fully
        self._has_proxy = has_proxy and wants_localhost_proxy(config, family)
        self._warnings: tuple[str, ...] = ()

    def make(self, node: Node | None) -> Context:
        """Return the context that results from this Node (None if unknown) and from the node's current addresses.

        Raises `SyncError` if the node's addresses cannot be read from the kernel. Logs each warning when it starts to
        apply, and not again while it continues to apply.
        """
        config = self._config
        try:
            addresses = local_addresses() if watches_addresses(config) else ()
        except OSError as error:
            raise SyncError(f"cannot read the addresses of this machine: {error.strerror or error}") from error
        context = make_context(
            config,
            self._family,
            local_node_name(config),
            node,
            addresses,
            accounting=self._accounting(),
            random_fully=self._random_fully,
            has_proxy=self._has_proxy,
            can_hold=self._has_proxy and matches_sockets(self._family),
        )
        warnings = (node_port_warning(config, node, context), local_traffic_warning(config, node, context))
        for warning in warnings:
            if warning and warning not in self._warnings:
                log.warning("%s", warning)
        self._warnings = warnings
        return context


def discover_iptables(on_progress: Callable[[Family], object] = lambda _: None) -> dict[Family, IptablesRunner]:
    """Return an iptables runner for each IP family that works on this node.

    A family that does not work is skipped with a warning, because kernels without IPv6 or without IPv6 NAT are common.
    Raises `CommandError` if no family works, or if IPv4 does not work on a node that needs it. Raises
    `InconclusiveError` if the failure may be temporary, for example because a program hung. Logs a warning if the
    iptables variant that is not in use contains Service rules.
    """
    found: dict[Family, IptablesRunner] = {}
    reasons: dict[Family, str] = {}
    generations = GenerationCounter(current_generation)
    for family in _candidate_families():
        iptables = IptablesRunner(family, partial(on_progress, family), generations)
        try:
            check_tables(family, iptables.version())
        except InconclusiveError:
            raise
        except CommandError as error:
            reasons[family] = str(error)
        else:
            found[family] = iptables
    if (ipv4_required := _why_ipv4_is_required(reasons)) or not found:
        raise CommandError(_combined_reasons(reasons, ipv4_required))
    _warn_of_skipped(reasons)
    version = next(iter(found.values())).version()
    if warning := other_variant_warning(uses_nft=version.nft):
        log.warning("%s", warning)
    return found


def discover_nftables() -> dict[Family, NetlinkCommit | NftCommit]:
    """Return the `Commit` implementation to use for each IP family that works on this node.

    A family that does not work is skipped with a warning. Raises `NftablesUnsupportedError` if no family works, or if
    IPv4 does not work on a node that needs it. Raises `InconclusiveError` if the failure may be temporary.
    """
    commits: dict[Family, NetlinkCommit | NftCommit] = {}
    reasons: dict[Family, str] = {}
    for family in _candidate_families():
        try:
            commits[family] = choose_commit(family)
        except NftablesUnsupportedError as error:
            reasons[family] = str(error)
    if (ipv4_required := _why_ipv4_is_required(reasons)) or not commits:
        raise NftablesUnsupportedError(_combined_reasons(reasons, ipv4_required))
    _warn_of_skipped(reasons)
    return commits


def ensure_packet_counters() -> bool:
    """Create the nfacct counters that rules refer to. If this fails, log the reason and return False."""
    try:
        ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER))
    except OSError as error:
        log.warning("running without nfacct packet counters: %s", error.strerror)
        return False
    return True


def _candidate_families() -> list[Family]:
    if IPV6_ADDRESSES.exists():
        return list(Family)
    log.warning("skipping IPv6: the kernel does not support it")
    return [Family.IPV4]


def _why_ipv4_is_required(reasons: Mapping[Family, str]) -> str:
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


def _warn_of_skipped(reasons: Mapping[Family, str]) -> None:
    for family, reason in reasons.items():
        log.warning("skipping %s: %s", family.value, reason)


def _combined_reasons(reasons: Mapping[Family, str], ipv4_required: str) -> str:
    """Return one line that says why each family failed.

    If only IPv4 failed, and it cannot be skipped, the line also says why it cannot be skipped.
    """
    families: dict[str, list[str]] = {}
    for family, reason in reasons.items():
        families.setdefault(reason, []).append(family.value)
    parts = [f"{' and '.join(names)}: {reason}" for reason, names in families.items()]
    return "; ".join([*parts, ipv4_required] if ipv4_required and Family.IPV6 not in reasons else parts)
