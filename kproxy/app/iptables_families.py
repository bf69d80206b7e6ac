"""iptables mode: build the backend of each IP family that works on this node."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial

from kproxy.app.candidate_families import candidate_families, combined_reasons, warn_of_skipped, why_ipv4_is_required
from kproxy.app.context_factory import ContextFactory
from kproxy.app.foreign_chains import watchful
from kproxy.app.own_commits import OwnCommits
from kproxy.config import Config
from kproxy.host.commands import CommandError, InconclusiveError
from kproxy.host.nf_tables import current_generation
from kproxy.host.nfacct import ensure_counters
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.foreign_changes import GenerationCounter
from kproxy.iptables.names import INVALID_COUNTER, LOCALHOST_COUNTER
from kproxy.iptables.runner import IptablesRunner, check_tables
from kproxy.iptables.save_restore import MAX_TRANSACTION_RULES, TABLES, UNLIMITED
from kproxy.iptables.variant import other_variant_warning
from kproxy.model.types import Family
from kproxy.sync.family_sync import FamilySync

log = logging.getLogger(__name__)


def iptables_families(
    config: Config, runners: list[IptablesRunner], own: OwnCommits, on_progress: Callable[[Family], object]
) -> dict[Family, FamilySync]:
    """Build the `FamilySync` of each IP family that works on this node, as `kproxy.app.backends.make_families` does.

    Raises `CommandError` if none works.
    """
    found = discover_iptables(on_progress)
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
        families[family] = FamilySync(watchful(backend, family), contexts.make)
    return families


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
    for family in candidate_families():
        iptables = IptablesRunner(family, partial(on_progress, family), generations)
        try:
            check_tables(family, iptables.version())
        except InconclusiveError:
            raise
        except CommandError as error:
            reasons[family] = str(error)
        else:
            found[family] = iptables
    if (ipv4_required := why_ipv4_is_required(reasons)) or not found:
        raise CommandError(combined_reasons(reasons, ipv4_required))
    warn_of_skipped(reasons)
    version = next(iter(found.values())).version()
    if warning := other_variant_warning(uses_nft=version.nft):
        log.warning("%s", warning)
    return found


def ensure_packet_counters() -> bool:
    """Create the nfacct counters that rules refer to. If this fails, log the reason and return False."""
    try:
        ensure_counters((INVALID_COUNTER, LOCALHOST_COUNTER))
    except OSError as error:
        log.warning("running without nfacct packet counters: %s", error.strerror)
        return False
    return True
