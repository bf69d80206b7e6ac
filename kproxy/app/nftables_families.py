"""nftables mode: build the backend of each IP family that works on this node."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from kproxy.app.candidate_families import candidate_families, combined_reasons, warn_of_skipped, why_ipv4_is_required
from kproxy.app.context_factory import ContextFactory
from kproxy.app.foreign_chains import watchful
from kproxy.app.localhost_node_ports import wants_localhost_proxy
from kproxy.app.own_commits import OwnCommits
from kproxy.config import Config
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import Commit, NetlinkCommit, NftCommit, NftTable
from kproxy.nftables.probe import NftablesUnsupportedError, choose_commit, why_no_counters
from kproxy.nftables.transaction import Transaction
from kproxy.sync.family_sync import Backend, FamilySync

if TYPE_CHECKING:
    from kproxy.app.localhost_listeners import Listeners

log = logging.getLogger(__name__)


def nftables_families(
    config: Config, own: OwnCommits, on_progress: Callable[[Family], object], listeners: Listeners | None
) -> dict[Family, FamilySync]:
    """Build the `FamilySync` of each IP family that works on this node, as `kproxy.app.backends.make_families` does.

    Raises `NftablesUnsupportedError` or `InconclusiveError` if none works.
    """
    commits = discover_nftables()
    for family, commit in commits.items():
        own.add([(family, names.TABLE)], commit.has_made_commits, commit.is_author)
    return {
        family: FamilySync(
            watchful(
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
                with_possible_counters(config, family, commit),
                family,
                accounting=lambda: False,
                random_fully=True,
                has_proxy=listeners is not None,
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


def with_possible_counters(config: Config, family: Family, commit: NetlinkCommit | NftCommit) -> Config:
    """Return the configuration, without connection counters if the kernel rejects them. Log a warning then."""
    if not config.kproxy.connection_counters or not (reason := why_no_counters(family, commit)):
        return config
    log.warning(
        "%s: kproxy.connectionCounters: running without connection counters, because the kernel rejects them: %s",
        family.value,
        reason,
    )
    return replace(config, kproxy=replace(config.kproxy, connection_counters=False))


def _reporting(commit: Commit, on_progress: Callable[[], object]) -> Commit:
    """Return a `Commit` that calls `on_progress` after each transaction that the kernel has accepted."""

    def commit_and_report(transaction: Transaction, generation: int | None = None, /) -> None:
        commit(transaction, generation)
        on_progress()

    return commit_and_report


def discover_nftables() -> dict[Family, NetlinkCommit | NftCommit]:
    """Return the `Commit` implementation to use for each IP family that works on this node.

    A family that does not work is skipped with a warning. Raises `NftablesUnsupportedError` if no family works, or if
    IPv4 does not work on a node that needs it. Raises `InconclusiveError` if the failure may be temporary.
    """
    commits: dict[Family, NetlinkCommit | NftCommit] = {}
    reasons: dict[Family, str] = {}
    for family in candidate_families():
        try:
            commits[family] = choose_commit(family)
        except NftablesUnsupportedError as error:
            reasons[family] = str(error)
    if (ipv4_required := why_ipv4_is_required(reasons)) or not commits:
        raise NftablesUnsupportedError(combined_reasons(reasons, ipv4_required))
    warn_of_skipped(reasons)
    return commits
