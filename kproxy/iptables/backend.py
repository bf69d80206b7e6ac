"""The iptables backend of one family: plans in, kernel rules out, and a ledger of what was accepted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from math import isqrt
from typing import Protocol

from kproxy.host.commands import CommandError
from kproxy.iptables.base_rules import EnsuredRule, ensured_rules
from kproxy.iptables.diff import IptablesDiff
from kproxy.iptables.dispatch import DISPATCH_THRESHOLD
from kproxy.iptables.ledger import IptablesLedger, IptablesSnapshot
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName
from kproxy.iptables.render import RenderedPort, render_port
from kproxy.iptables.runner import RestoreError
from kproxy.iptables.save_restore import RestoreInput, read_save
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import ApplyResult, Plans, SyncError
from kproxy.model.types import ServiceKey

log = logging.getLogger(__name__)
BLOCK_RULES = 1200
"""How many rules one transaction holds at most in a large change: about 40 Services of 10 endpoints.

iptables-nft needs time that grows with the square of the rules in a transaction, and some for each transaction. Its CPU
for 1,000 and 5,000 Services of 10 endpoints: in blocks of 600 rules 0.8 and 6.3 s, of 1,200 0.7 and 4.6 s, of 2,400 0.9
and 4.7 s, of 6,000 1.0 and 6.2 s; in one transaction 5.3 s and minutes.
"""
CHANGED_FACTOR = 17
"""How many times the root of the number of all rules a transaction may hold instead if that is more, when there are
rules already.

For each transaction that changes what is in use, the kernel goes through all rules, and so iptables-nft needs time that
grows with all rules for each, and with the square of the rules in it: the sum is least where both are equal. CPU for
1,000 Services whose ten endpoints are written anew, of 1,000 Services in blocks of 1,200, 2,500 and 8,000 rules 0.85,
0.80 and 1.2 s; of 5,000 in 2,000, 5,600 and 8,000 1.6, 1.2 and 1.4 s; of 10,000 in 4,000, 8,000 and 12,000 1.9, 1.7 and
2.5 s.
"""
UNLIMITED = 1 << 60
"""A size of block that holds any change: for iptables-legacy, where a transaction's cost is that of the whole table."""


class IptablesKernel(Protocol):
    """The way to one family's rules; `kproxy.iptables.runner.IptablesRunner` is the real one."""

    def save(self) -> AbstractContextManager[Iterator[str]]:
        """Return all rules as `iptables-save` prints them, and a line about each table that it cannot print."""

    def restore(self, text: str) -> None:
        """Make the changes of an `iptables-restore --noflush` input, or raise `RestoreError`."""

    def restore_each(self, texts: Iterable[str]) -> None:
        """Make the changes of inputs, one after the other, and ask for none after one that is not accepted."""

    def has(self, chain: ChainName, rule: str) -> bool | None:
        """Return whether a chain has a rule, None if that cannot be told."""

    def look(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those chains that exist as `iptables-save` prints them, as far as they can be had."""

    def lengths(self, chains: Collection[ChainName]) -> dict[ChainName, int]:
        """Return how many rules chains have, as far as that can be told cheaply."""

    def create(self, chain: ChainName) -> None:
        """Create a chain unless it exists."""


class IptablesBackend:
    """Keeps one family's rules equal to the plans that it is given.

    The kernel is read when nothing is known about it (at start and after a failure) and at no other time.
    """

    def __init__(
        self,
        kernel: IptablesKernel,
        *,
        block_rules: int = BLOCK_RULES,
        dispatch_threshold: int = DISPATCH_THRESHOLD,
        patching: bool = True,
    ) -> None:
        """`block_rules` is how many rules a transaction of a large change may hold: `UNLIMITED` for iptables-legacy.

        A dispatch chain of more than `dispatch_threshold` rules is split by destination; with 0, none is. With
        `patching`, of long chains in which few rules differ only these are written.
        """
        self._kernel = kernel
        self._block_rules = block_rules
        self._dispatch_threshold = dispatch_threshold
        self._patching = patching
        self._ledger: IptablesLedger | None = None

    @property
    def needs_full_sync(self) -> bool:
        """Whether the next `sync` must be given the plans of all Services."""
        return self._ledger is None

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Bring the kernel to `plans`: the Services that may have changed, or all if `needs_full_sync`.

        A Service without plans is deleted. Raises `SyncError` if the kernel refused; what was accepted before stays.
        """
        ledger, view = (self._ledger, None) if self._ledger is not None else (IptablesLedger(), self._read(context))
        wanted = ((key, render_ports(ports, context)) for key, ports in plans.by_service())
        change = IptablesDiff(
            ledger,
            view,
            wanted,
            context,
            block_rules=self._block_for(ledger) if view is None else self._block_rules,
            dispatch_threshold=self._dispatch_threshold,
            lengths=self._kernel.lengths if self._patching else None,
        )
        self._ledger = None
        written: Counter[str] = Counter()
        self._make(change, written)
        if crossed := self._crossed(change.patched):
            log.warning("others changed %d chains at the same moment: written anew", len(crossed))
            self._make(self._repair(ledger, crossed, plans, context), written)
        self._ledger = ledger
        return ApplyResult(written, ledger.rules, ledger.settlement.conflicts)

    def _make(self, change: IptablesDiff, written: Counter[str]) -> None:
        """Make a change, and count the rules that it wrote. Raises `SyncError`."""
        optional: list[RestoreInput] = []

        def texts() -> Iterator[str]:
            for transaction in change.transactions():
                if transaction.may_fail:
                    optional.append(transaction)
                    continue
                written.update(transaction.rules_by_table())
                yield transaction.text()

        try:
            self._kernel.restore_each(texts())
            for transaction in optional:
                self._try(transaction)
        except (RestoreError, CommandError) as error:
            raise SyncError(str(error)) from None
        change.commit()

    def _crossed(self, patched: Mapping[ChainName, tuple[ServiceKey, int]]) -> dict[ChainName, ServiceKey]:
        """Return the patched chains, each with its Service, that have not as many rules as they should have.

        Between the look before a patch and the patch somebody else may have been there: another proxy that was told
        of the same endpoints, and then a rule of one that is left was deleted. Where it cannot be told, so it counts.
        """
        lengths = self._kernel.lengths(patched) if patched else {}
        return {chain: key for chain, (key, length) in patched.items() if lengths.get(chain) != length}

    def _repair(
        self, ledger: IptablesLedger, crossed: Mapping[ChainName, ServiceKey], plans: Plans, context: Context
    ) -> IptablesDiff:
        """Return the change that writes chains anew whatever the ledger says, each given with its Service."""
        return IptablesDiff(
            ledger,
            None,
            ((key, render_ports(plans.of(key), context)) for key in dict.fromkeys(crossed.values())),
            context,
            block_rules=self._block_for(ledger),
            dispatch_threshold=self._dispatch_threshold,
            doubted=crossed,
        )

    def forget(self) -> None:
        """Let the next `sync` read all rules."""
        self._ledger = None

    def verify(self, context: Context) -> bool:
        """Return whether what leads to the Services is as it should be; if not, forget what is known.

        What is looked at: the canaries (gone when a table's chains were deleted), the rules that belong in chains
        shared with others, and those of the chains that all Services share, less the shards.
        """
        if self._ledger is None:
            return True
        ours = dict(self._ledger.shared_chains())
        ensured = ensured_rules(context)
        try:
            held = self._kernel.look(dict.fromkeys((*CANARIES, *ours, *(rule.chain for rule in ensured))))
            whole = (
                all(canary in held for canary in CANARIES)
                and all(chain in held and hash("\n".join(held[chain])) == digest for chain, digest in ours.items())
                and all(self._may_hold(rule, held.get(rule.chain, [])) for rule in ensured)
            )
        except CommandError as error:
            log.warning("cannot look at the rules: %s", error)
            return True
        if not whole:
            self._ledger = None
        return whole

    def _may_hold(self, rule: EnsuredRule, listed: list[str]) -> bool:
        """Return whether an ensured rule is in force for all that can be told, given what is listed of its chain."""
        return rule.is_met_by_one_of(listed) or self._kernel.has(rule.chain, rule.rule) is not False

    def _block_for(self, ledger: IptablesLedger) -> int:
        """Return how many rules a transaction may hold that changes what a ledger has."""
        return max(self._block_rules, CHANGED_FACTOR * isqrt(sum(ledger.rules.values())))

    def _try(self, transaction: RestoreInput) -> None:
        """Make whatever part of a transaction is possible that deletes chains, and nothing else."""
        try:
            self._kernel.restore(transaction.text())
        except RestoreError as error:
            chains = transaction.deleted
            if len(chains) == 1:
                log.warning("chain %s is not ours any more but somebody uses it: %s", chains[0].name, error)
                return
            for half in (chains[: len(chains) // 2], chains[len(chains) // 2 :]):
                self._try(RestoreInput(deleted=half, may_fail=True))

    def _read(self, context: Context) -> IptablesSnapshot:
        try:
            with self._kernel.save() as lines:
                saved = read_save(lines)
            view = IptablesSnapshot.of(saved.chains)
            for table, reason in saved.incompatible.items():
                self._ask_for_shared_rules(view, table, context)
                log.warning(
                    "table %s holds rules that only nft can show (%s): chains of others may be left there",
                    table,
                    reason,
                )
        except CommandError as error:
            raise SyncError(str(error)) from None
        return view

    def _ask_for_shared_rules(self, view: IptablesSnapshot, table: str, context: Context) -> None:
        """Find out by questions about single chains and rules what no dump shows.

        A rule that cannot be told to be there is put in: twice does no harm, and then it is above what hid it.
        """
        if FILTER_FIREWALL.table == table:
            self._kernel.create(FILTER_FIREWALL)
            view.shared[FILTER_FIREWALL] = []
        ensured = [rule for rule in ensured_rules(context) if rule.chain.table == table]
        view.shared |= self._kernel.look(dict.fromkeys(rule.chain for rule in ensured))
        for rule in ensured:
            held = view.shared.setdefault(rule.chain, [])
            if not rule.is_met_by_one_of(held) and self._kernel.has(rule.chain, rule.rule):
                held.append(rule.text)


def render_ports(ports: Sequence[ServicePortPlan], context: Context) -> dict[str, RenderedPort]:
    """Return the rules of a Service's ports by `port name/protocol`."""
    return {f"{plan.port_name}/{plan.protocol}": render_port(plan, context) for plan in ports}


class IptablesPrinter:
    """A backend that hands on what it would do to an empty kernel, as text."""

    needs_full_sync = True

    def verify(self, context: Context) -> bool:  # noqa: ARG002 - there is no kernel that could differ
        """Return that nothing is missing."""
        return True

    def forget(self) -> None:
        """Do nothing: everything is handed on each time."""

    def __init__(self, show: Callable[[str], object], *, dispatch_threshold: int = DISPATCH_THRESHOLD) -> None:
        self._show = show
        self._dispatch_threshold = dispatch_threshold

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """Hand on the one `iptables-restore --noflush` input that programs all `plans`."""
        wanted = ((key, render_ports(ports, context)) for key, ports in plans.by_service())
        ledger = IptablesLedger()
        change = IptablesDiff(
            ledger,
            IptablesSnapshot({}, {}),
            wanted,
            context,
            block_rules=UNLIMITED,
            dispatch_threshold=self._dispatch_threshold,
        )
        for transaction in change.transactions():
            self._show(transaction.text())
        change.commit()
        return ApplyResult({}, {}, ledger.settlement.conflicts)
