"""Compute a short, safe sequence of transactions from the state in the ledger to the desired state.

Pure, except that it may call a `RuleCounter` to count the rules of chains in the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeAlias

from kproxy.iptables.base_rules import base_chains, dispatch_trailing_rules, ensured_rules
from kproxy.iptables.dispatch import lay_out
from kproxy.iptables.foreign_rules import first_blocking_rule, group_by_chain, restore_commands
from kproxy.iptables.ledger import (
    Digest,
    DispatchRecord,
    IptablesLedger,
    IptablesSnapshot,
    PortRecord,
    ServiceRecord,
    changed_dispatch_chains,
)
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName, deletion_order
from kproxy.iptables.patch import make_patch
from kproxy.iptables.render import RenderedPort
from kproxy.iptables.save_restore import RestoreInput, count_rules
from kproxy.model.context import Context
from kproxy.model.types import ServiceKey

RenderedServices: TypeAlias = Iterable[tuple[ServiceKey, Mapping[str, RenderedPort]]]
"""The Services that may have changed, with the rules of their ports. A deleted Service has no ports.

The diff iterates over the Services while it generates transactions, so that the rules of a large cluster are never in
memory all at once.
"""
RuleCounter: TypeAlias = Callable[[Collection[ChainName]], Mapping[ChainName, int]]
"""Returns the number of rules that each of the given chains has in the kernel. Chains whose rules cannot be counted are
omitted.
"""


class IptablesDiff:
    """The transactions, in order, that take the kernel from the state in a ledger to the desired state.

    A `snapshot` of the kernel's rules is given if the ledger is not known to match the kernel, for example at startup
    and after a failure. The ledger must then be empty, and `desired` must contain all Services. The snapshot determines
    which chains are written, which rules are inserted into chains that other tools also use, and which chains are
    deleted.

    The dispatch chains are the shared chains that match a packet's destination and jump to per-Service chains. A
    dispatch chain with more than `dispatch_threshold` service rules is split into shards: smaller chains, each of which
    handles some of the destinations. If `dispatch_threshold` is 0, no dispatch chain is split.

    The time that iptables-nft needs for a transaction grows with the square of the number of rules in it. A change of
    more than `max_transaction_rules` rules is therefore split into several transactions, each of which is safe on its
    own. They write the chains that do not depend on Services first, then the per-Service chains, then the shards from
    the bottom up, and then the dispatch chains. Finally they delete unused chains.

    With a `rule_counter`, a long per-Service chain is patched rule by rule, provided that only a few of its rules
    differ and that the chain has the same number of rules in the kernel as in the ledger. All other chains are
    rewritten. In particular, dispatch chains and shards are never patched: iptables-nft can write the 32 rules of a
    shard in less time than it needs to find one rule in a chain of 10,000.

    `patched` maps each patched chain to its Service and to the number of rules that the chain must have after the
    transactions.

    The chains in `force_rewrite` are written even if they match the ledger. `edits` are further commands for individual
    rules, each with its table; they are part of the last transaction that writes rules.
    """

    def __init__(
        self,
        ledger: IptablesLedger,
        snapshot: IptablesSnapshot | None,
        desired: RenderedServices,
        context: Context,
        *,
        max_transaction_rules: int,
        dispatch_threshold: int,
        rule_counter: RuleCounter | None = None,
        force_rewrite: Collection[ChainName] = (),
        edits: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.patched: dict[ChainName, tuple[ServiceKey, int]] = {}
        self._ledger = ledger
        self._snapshot = snapshot
        self._desired = desired
        self._context = context
        self._max_transaction_rules = max_transaction_rules
        self._dispatch_threshold = dispatch_threshold
        self._rule_counter = rule_counter
        self._force_rewrite = force_rewrite
        self._edits = edits
        self._services: dict[ServiceKey, ServiceRecord] = {}
        self._base: dict[ChainName, Digest] = {}
        self._base_rules: Counter[str] = Counter()
        self._dispatch: dict[ChainName, DispatchRecord] = {}
        self._resolution = ledger.resolution
        self._dispatch_chains: dict[ChainName, str] = {}
        self._deleted: list[ChainName] = []

    @property
    def services(self) -> Collection[ServiceKey]:
        """The Services that the transactions have covered so far."""
        return self._services.keys()

    def transactions(self) -> Iterator[RestoreInput]:
        """Yield the transactions. There are none if the kernel already has the desired state."""
        current = RestoreInput(self._base_changes())
        cost = current.cost
        for change in self._chain_changes():
            added = change.cost
            if current and cost + added > self._max_transaction_rules:
                yield current
                current, cost = RestoreInput(), 0
            current.chains |= change.chains
            current.patches |= change.patches
            cost += added
        entry = self._entry_change()
        self._deleted += self._stale_chains()
        # Other tools may have added jumps to stale chains that the snapshot found. The kernel then rejects the deletion
        # of these chains, which must not block the other changes.
        best_effort = self._snapshot is not None
        if cost + entry.cost > self._max_transaction_rules:
            yield from [current] if current else []
            current = entry
        else:
            current.chains |= entry.chains
            current.edits = entry.edits
        if not best_effort and current.cost + len(self._deleted) <= self._max_transaction_rules:
            current.deleted, self._deleted = self._deleted, []
        yield from [current] if current else []
        remaining = iter(sorted(self._deleted, key=deletion_order))
        while batch := list(islice(remaining, self._max_transaction_rules)):
            yield RestoreInput(deleted=batch, best_effort=best_effort)

    def commit(self) -> None:
        """Update the ledger after the kernel has accepted all transactions."""
        for key, record in self._services.items():
            self._ledger.put(key, record)
        self._ledger.put_base(self._base, self._base_rules)
        self._ledger.resolution = self._resolution
        self._ledger.dispatch = self._dispatch

    def _base_changes(self) -> dict[ChainName, str]:
        """Return those Service-independent chains that must be written.

        They are part of the first transaction, because per-Service chains jump to some of them.
        """
        chains = base_chains(self._context)
        self._base = {chain: hash(rules) for chain, rules in chains.items()}
        for chain, rules in chains.items():
            self._base_rules[chain.table] += count_rules([rules])
        martian_rules = sum(rule.chain == FILTER_FIREWALL for rule in ensured_rules(self._context))
        self._base_rules[FILTER_FIREWALL.table] += martian_rules
        existing = self._snapshot.digests if self._snapshot else self._ledger.base
        changed = {
            chain: rules
            for chain, rules in chains.items()
            if existing.get(chain) != self._base[chain] or chain in self._force_rewrite
        }
        missing = (chain for chain in (*CANARIES, FILTER_FIREWALL) if chain in self._force_rewrite)
        return changed | dict.fromkeys(missing, "")

    def _chain_changes(self) -> Iterator[RestoreInput]:
        """Yield the changes to per-Service chains and shards. A change must not be split across transactions."""
        yield from self._service_changes()
        yield from (RestoreInput({shard: rules}) for shard, rules in self._shard_changes())

    def _service_changes(self) -> Iterator[RestoreInput]:
        """Yield one change for each Service whose per-Service chains must change. It covers all of these chains."""
        for key, ports in self._desired:
            record = {name: PortRecord.from_rendered(rendered) for name, rendered in ports.items()}
            self._services[key] = record
            old = self._ledger.services.get(key, {})
            accepted = {name: digest for port in old.values() for name, digest in port.chains()}
            change = RestoreInput()
            for name, rendered in ports.items():
                for (chain, digest), rules in zip(record[name].chains(), rendered.chains.values(), strict=True):
                    existing = accepted.pop(chain, None)
                    if self._snapshot is not None:
                        existing = self._snapshot.digests.get(ChainName("nat", chain))
                    if existing != digest or ChainName("nat", chain) in self._force_rewrite:
                        self._add_chain(change, chain, rules, old.get(name))
            self._deleted += [ChainName("nat", name) for name in accepted]
            if change.patches and self._rule_counter is not None:
                # Check here, per Service, whether the patches are applicable. A chain whose patch is not applicable is
                # rewritten, and this affects how many Services fit into a transaction.
                change = change.with_applicable_patches(self._rule_counter(change.patches))
                self.patched |= {chain: (key, patch.new_length) for chain, patch in change.patches.items()}
            if change:
                yield change

    def _add_chain(self, change: RestoreInput, name: str, rules: str, old: PortRecord | None) -> None:
        """Add a per-Service chain to a change: as a patch if that is possible and cheaper, else as a rewritten chain.

        `old` is the record of the service port in the ledger. A patch requires the digests of the existing rules, which
        are part of the record.
        """
        chain = ChainName("nat", name)
        existing = old.rule_digests_of(name) if old is not None and self._rule_counter is not None else ()
        if existing and (patch := make_patch(name, existing, rules)) is not None:
            change.patches[chain] = patch
        else:
            change.chains[chain] = rules

    def _shard_changes(self) -> Iterator[tuple[ChainName, str]]:
        """Yield the shards to write, with their rules.

        The dispatch chains to write are stored; `_entry_change` returns them.
        """
        trailing_rules = dispatch_trailing_rules(self._context)
        self._resolution = self._ledger.resolve_conflicts(self._context.family, self._services)
        omitted = self._resolution.omitted_rules
        dirty = self._dirty_dispatch_chains(trailing_rules)
        for dispatch_chain, all_rules in self._ledger.dispatch_rules(dirty, self._services).items():
            trailing = trailing_rules[dispatch_chain]
            rules = [rule for rule in all_rules if rule not in omitted] if omitted else all_rules
            layout = lay_out(dispatch_chain, rules, trailing, self._context.family, self._dispatch_threshold)
            digests = {chain: hash(text) for chain, text in layout.chains.items()}
            record = self._ledger.dispatch.get(dispatch_chain)
            accepted = record.chains if record is not None else {}
            existing = self._snapshot.digests if self._snapshot else accepted
            self._dispatch[dispatch_chain] = DispatchRecord(hash(trailing), digests, layout.non_service_rules)
            self._deleted += [chain for chain in accepted if chain not in digests]
            changed = {
                chain: text
                for chain, text in layout.chains.items()
                if existing.get(chain) != digests[chain] or chain in self._force_rewrite
            }
            if dispatch_chain in changed:
                self._dispatch_chains[dispatch_chain] = changed.pop(dispatch_chain)
            yield from changed.items()

    def _dirty_dispatch_chains(self, trailing_rules: Mapping[ChainName, tuple[str, ...]]) -> list[ChainName]:
        """Return the dispatch chains that may change. Copy the records of all other dispatch chains from the ledger."""
        if self._snapshot is not None:
            return list(trailing_rules)
        dirty: set[ChainName] = set()
        for key, record in self._services.items():
            dirty |= changed_dispatch_chains(self._ledger.services.get(key, {}), record)
        dirty |= {rule.chain for rule in self._resolution.omitted_rules ^ self._ledger.resolution.omitted_rules}
        if self._force_rewrite:
            dirty |= {
                chain
                for chain, accepted in self._ledger.dispatch.items()
                if any(each in self._force_rewrite for each in accepted.chains)
            }
        for chain, accepted in self._ledger.dispatch.items():
            if chain not in dirty and accepted.trailing_rules == hash(trailing_rules[chain]):
                self._dispatch[chain] = accepted
        return [chain for chain in trailing_rules if chain not in self._dispatch]

    def _entry_change(self) -> RestoreInput:
        """Return the change to the dispatch chains and to the rules that jump to them.

        This change activates all new chains.
        """
        change = RestoreInput(dict(self._dispatch_chains), edits=list(self._edits))
        if self._snapshot is not None:
            self._ensure_rules(change, self._snapshot)
        return change

    def _ensure_rules(self, change: RestoreInput, snapshot: IptablesSnapshot) -> None:
        for chain in (*CANARIES, FILTER_FIREWALL):
            if chain not in snapshot.rules:
                change.chains[chain] = ""
        blocked = {
            chain: blocked_from
            for chain, rules in group_by_chain(ensured_rules(self._context)).items()
            if (existing := snapshot.rules.get(chain))
            and (blocked_from := first_blocking_rule(existing, rules, lambda called: snapshot.rules.get(called, ())))
            < len(existing)
        }
        # Each rule is inserted at the top of its chain, so the rule that is inserted last comes first.
        for rule in reversed(ensured_rules(self._context)):
            if rule.chain in blocked:
                continue
            existing = snapshot.rules.get(rule.chain, [])
            if not rule.is_satisfied_by_any(existing):
                change.edits.append((rule.chain.table, f"-I {rule.chain.name} 1 {rule.rule}"))
            # Delete duplicates: two proxies that started at the same time may both have inserted the rule.
            duplicates = existing.count(rule.text) - 1
            change.edits += [(rule.chain.table, f"-D {rule.chain.name} {rule.rule}")] * duplicates
        for chain, blocked_from in blocked.items():
            rules = [rule for rule in ensured_rules(self._context) if rule.chain == chain]
            commands = restore_commands(snapshot.rules[chain], rules, blocked_from)
            change.edits += [(chain.table, command) for command in commands]

    def _stale_chains(self) -> list[ChainName]:
        if self._snapshot is None:
            return []
        used = (name for record in self._services.values() for port in record.values() for name, _ in port.chains())
        shards = {shard for record in self._dispatch.values() for shard in record.chains}
        return self._snapshot.stale_chains(used, shards)
