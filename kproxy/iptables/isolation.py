"""Find the Services whose rules the kernel rejects, and program all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from kproxy.iptables.diff import IptablesDiff, ServiceBlocks
from kproxy.iptables.ledger import ServiceRecord
from kproxy.iptables.names import CANARIES, ChainName
from kproxy.iptables.runner import RestoreError
from kproxy.iptables.save_restore import RestoreInput
from kproxy.model.types import ServiceKey

TRIAL_CHAIN = "KUBE-SVC-0.0.0.0/0"
"""A chain to which nothing jumps. Dispatch rules are added to it to find those that the kernel rejects.

It has the name of a shard, so that it is deleted with the stale shards if kproxy is killed before it deletes the chain.
"""
TRIAL_SERVICES = 512
"""Maximum number of Services whose dispatch rules are tried together."""


class IsolatingSync:
    """Applies a diff in small transactions, each of which is a run of iptables-restore of its own.

    If the kernel rejects a transaction, the Services in it that it rejects are found: by the rejected line if
    iptables names it, otherwise by bisection. These Services keep their existing rules, which `record_of` describes.
    Damaged chains of these are restored, if the diff knows their rules. If the kernel no longer accepts their dispatch
    rules either, they lose them.

    `rejected` maps them to the reasons. `written` counts the rules that were written, by table.
    """

    def __init__(
        self,
        restore: Callable[[str], None],
        diff: IptablesDiff,
        record_of: Callable[[ServiceKey], ServiceRecord],
        confirm: Callable[[ServiceKey], None],
        *,
        max_transaction_rules: int,
        written: Counter[str],
    ) -> None:
        """Create the sync.

        `restore` applies input for iptables-restore, and raises `RestoreError` or `CommandError`. `confirm` is called
        before a Service that the diff does not cover loses its rules. It raises `DriftError` if another process has
        changed the chains of this Service, which is why the kernel rejects rules that jump to them.
        """
        self.rejected: dict[ServiceKey, str] = {}
        self._restore = restore
        self._diff = diff
        self._record_of = record_of
        self._confirm = confirm
        self._max_transaction_rules = max_transaction_rules
        self._written = written

    def run(self) -> list[ChainName]:
        """Apply the diff, but neither commit it nor delete any chain. Return the chains to delete after the commit.

        Raises `RestoreError` if the kernel rejects rules that do not belong to any Service, `DriftError` or
        `CommandError`.
        """
        self._apply(self._diff.base_change())
        group: list[ServiceBlocks] = []
        cost = 0
        for change in self._diff.service_changes():
            added = sum(block.cost for block in change.blocks)
            if group and cost + added > self._max_transaction_rules:
                self._apply_group(group)
                group, cost = [], 0
            group.append(change)
            cost += added
        self._apply_group(group)
        self._apply_dispatch()
        return self._diff.unused_chains()

    def _apply(self, change: RestoreInput) -> None:
        """Apply a change, one table at a time, so that it is known what the kernel has accepted if it fails."""
        for part in change.by_table():
            self._restore(part.text())
            self._diff.accept(part)
            self._written.update(part.rules_by_table())

    def _apply_group(self, group: Sequence[ServiceBlocks]) -> None:
        """Apply the changes to the per-Service chains of some Services, and hold those that the kernel rejects."""
        remaining = list(group)
        while remaining:
            try:
                self._apply_blocks(remaining)
            except RestoreError as error:
                self._require_partial(error)
                culprit = remaining[0].key if len(remaining) == 1 else _owner(remaining, error.chain)
                if culprit is None:
                    middle = len(remaining) // 2
                    self._apply_group(remaining[:middle])
                    remaining = remaining[middle:]
                else:
                    self._hold(culprit, error)
                    remaining = [change for change in remaining if change.key != culprit]
            else:
                return

    def _apply_blocks(self, changes: Sequence[ServiceBlocks]) -> None:
        if len(changes) == 1:
            for block in changes[0].blocks:
                self._apply(block)
            return
        merged = RestoreInput()
        for change in changes:
            for block in change.blocks:
                merged.add(block)
        self._apply(merged)

    def _apply_dispatch(self) -> None:
        """Write the shards and dispatch chains, and hold the Services whose dispatch rules the kernel rejects."""
        while True:
            try:
                for change in self._diff.dispatch_changes():
                    self._apply(change)
            except RestoreError as error:
                self._require_partial(error)
                culprit = self._owner_of_dispatch_rule(error.line)
                if culprit is not None:
                    self._hold(culprit, error)
                elif not any(self._search(candidates) for candidates in self._candidates()):
                    raise
            else:
                return

    def _candidates(self) -> tuple[list[ServiceKey], list[ServiceKey]]:
        """Return the Services whose dispatch rules the kernel may reject: those with new rules, and all others.

        The kernel may reject even a rule that exists, when the chain is rewritten because of another Service.
        """
        new = [key for key in self._diff.services if key not in self.rejected]
        return new, list(self._diff.all_services() - set(new))

    def _owner_of_dispatch_rule(self, line: str) -> ServiceKey | None:
        """Return the Service that adds the dispatch rule in a line of input. The line may name a shard."""
        body = _body(line)
        if not body:
            return None
        return next(
            (
                key
                for candidates in self._candidates()
                for key in candidates
                if any(_body(rule.rule) == body for rule in self._diff.dispatch_rules_of(key))
            ),
            None,
        )

    def _search(self, candidates: Sequence[ServiceKey]) -> bool:
        """Hold the Services whose dispatch rules the kernel rejects. Return whether there are any."""
        found = False
        groups = [candidates[index : index + TRIAL_SERVICES] for index in range(0, len(candidates), TRIAL_SERVICES)]
        while groups:
            group = groups.pop()
            rules: dict[ChainName, list[str]] = {}
            for key in group:
                for rule in self._diff.dispatch_rules_of(key):
                    chain = ChainName(rule.chain.table, TRIAL_CHAIN)
                    rules.setdefault(chain, []).append(f"-A {TRIAL_CHAIN} {_body(rule.rule)}")
            trial = RestoreInput({chain: "\n".join(each) for chain, each in rules.items()})
            try:
                self._restore(trial.text())
            except RestoreError as error:
                self._require_partial(error)
                if len(group) == 1:
                    self._hold(group[0], error)
                    found = True
                else:
                    groups += [group[: len(group) // 2], group[len(group) // 2 :]]
        self._restore(RestoreInput(deleted=[ChainName(table, TRIAL_CHAIN) for table in ("nat", "filter")]).text())
        return found

    def _require_partial(self, error: RestoreError) -> None:
        """Raise an exception if the kernel now rejects every change, which is not the fault of a Service."""
        if error.affects_all:
            raise error
        self._restore(RestoreInput(dict.fromkeys(CANARIES, "")).text())

    def _hold(self, key: ServiceKey, error: RestoreError) -> None:
        """Keep the existing rules of a Service, or remove them if the kernel rejects these, too."""
        if key not in self._diff.services:
            self._confirm(key)
        new = key in self._diff.services and key not in self.rejected
        self.rejected.setdefault(key, str(error))
        record = self._record_of(key) if new else {}
        self._restore_kept(key, record)
        self._diff.hold(key, record)

    def _restore_kept(self, key: ServiceKey, record: ServiceRecord) -> None:
        """Restore damaged chains of a Service that keeps its existing rules, unless the kernel rejects them."""
        try:
            for block in self._diff.kept_blocks(key, record):
                self._apply(block)
        except RestoreError as error:
            self._require_partial(error)


def _owner(changes: Collection[ServiceBlocks], chain: str) -> ServiceKey | None:
    """Return the Service whose change writes a per-Service chain, or None."""
    name = ChainName("nat", chain)
    return next((change.key for change in changes if any(name in block.chains for block in change.blocks)), None)


def _body(line: str) -> str:
    """Return the rule in a line `-A CHAIN RULE`, or "" for any other line."""
    return line.split(" ", 2)[2] if line.startswith("-A ") and line.count(" ") > 1 else ""
