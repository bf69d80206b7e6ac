"""Check whether the kernel accepts the rules of this node, without changing the node's rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from tempfile import TemporaryDirectory
from typing import Literal

from msgspec import Struct

from kproxy.app.desired_state import DesiredState
from kproxy.app.iptables_families import ensure_packet_counters
from kproxy.config import Config
from kproxy.host.commands import CommandError, run
from kproxy.host.temporary_namespace import NoNamespaceError, call_in_new_namespace
from kproxy.iptables.backend import IptablesBackend
from kproxy.iptables.desired_rules import DesiredRules, desired_rules
from kproxy.iptables.ledger import record_chains
from kproxy.iptables.runner import IptablesRunner, RestoreError, make_restore_error, program_name
from kproxy.iptables.save_restore import MAX_TRANSACTION_RULES, UNLIMITED
from kproxy.model.context import Context
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family, Node, ServiceKey
from kproxy.nftables.backend import NftablesBackend
from kproxy.nftables.kernel import NftTable
from kproxy.nftables.trial import TrialCommit
from kproxy.sync.family_sync import Backend, FamilySync

_LOCK_VARIABLE = "XTABLES_LOCKFILE"
TEST_SECONDS = 600.0
"""Time limit for one `iptables-restore --test`."""


class Trial(Struct, frozen=True):
    """The result of the check of one family.

    `rejected` maps the Services whose rules are rejected to the reasons. `problem` is why nothing can be programmed, or
    "". If `by` is `iptables`, only iptables-restore has checked the rules, because this process may not create a
    network namespace.
    """

    by: Literal["kernel", "iptables"]
    rejected: Mapping[ServiceKey, str]
    problem: str = ""


def try_rules(config: Config, state: DesiredState) -> dict[Family, Trial]:
    """Check the rules of each family.

    In nftables mode, the kernel checks the transactions that `kproxy apply` would commit to the existing table. In
    iptables mode, `iptables-restore` cannot make the kernel check rules without committing them: they are committed in
    an empty network namespace that is deleted afterwards.
    """
    if state.mode == "nftables":
        return {family: _run(nftables_backend(TrialCommit(family), family), state, family) for family in state.families}
    try:
        with _own_lock_file():
            return call_in_new_namespace(partial(_try_iptables, config, state))
    except NoNamespaceError:
        threshold = config.kproxy.iptables_dispatch_threshold
        return {
            family: _test_syntax(family, desired_rules(each.plans, each.context, threshold))
            for family, each in state.families.items()
        }


@contextmanager
def _own_lock_file() -> Iterator[None]:
    """Let iptables-legacy use a lock of its own: the one of the node would hold up all other programs meanwhile.

    If no directory is writable, it uses the one of the node.
    """
    before = os.environ.get(_LOCK_VARIABLE)
    with ExitStack() as stack:
        with suppress(OSError):
            folder = stack.enter_context(TemporaryDirectory(prefix="kproxy-"))
            os.environ[_LOCK_VARIABLE] = f"{folder}/xtables.lock"
        try:
            yield
        finally:
            os.environ.pop(_LOCK_VARIABLE, None)
            if before is not None:
                os.environ[_LOCK_VARIABLE] = before


def nftables_backend(commit: TrialCommit, family: Family) -> NftablesBackend:
    """Return a backend that reads the table of a family, but whose transactions are only checked."""
    return NftablesBackend(NftTable(family, commit), batch_frontends=UNLIMITED)


def _try_iptables(config: Config, state: DesiredState) -> dict[Family, Trial]:
    if any(each.context.accounting for each in state.families.values()):
        ensure_packet_counters()
    trials = {}
    for family in state.families:
        iptables = IptablesRunner(family)
        backend = IptablesBackend(
            iptables,
            max_transaction_rules=MAX_TRANSACTION_RULES if iptables.version().nft else UNLIMITED,
            dispatch_threshold=config.kproxy.iptables_dispatch_threshold,
        )
        trials[family] = _run(backend, state, family)
    return trials


def _run(backend: Backend, state: DesiredState, family: Family) -> Trial:
    context = state.families[family].context
    make: Callable[[Node | None], Context] = lambda _: context  # noqa: E731
    try:
        result = FamilySync(backend, make).sync(state.store)
    except (SyncError, CommandError) as error:
        return Trial("kernel", {}, str(error))
    return Trial("kernel", dict(result.applied.rejected))


def _test_syntax(family: Family, desired: DesiredRules) -> Trial:
    """Let `iptables-restore --test` parse the rules. It stops at the first invalid one."""
    program = f"{program_name(family)}-restore"
    text = desired.text()
    try:
        done = run([program, "--test", "--noflush"], text, timeout=TEST_SECONDS)
    except CommandError as error:
        return Trial("iptables", {}, str(error))
    if not done.code:
        return Trial("iptables", {})
    lines = text.split("\n")
    failed = make_restore_error(program, done.code, done.stderr, lambda number: _line(lines, number))
    owner = _owner(desired, failed)
    return Trial("iptables", {owner: str(failed)}) if owner else Trial("iptables", {}, str(failed))


def _line(lines: list[str], number: int) -> str:
    return lines[number - 1] if 0 < number <= len(lines) else ""


def _owner(desired: DesiredRules, error: RestoreError) -> ServiceKey:
    """Return the Service to which a rejected rule belongs, or ""."""
    for key, record in desired.ledger.services.items():
        if any(name == error.chain for name, _ in record_chains(record)):
            return key
        if any(rule.rule == error.line for port in record.values() for rule in port.dispatch):
            return key
    return ""
