"""Compute a short, safe sequence of transactions from the state in the ledger to the desired state.

Pure, except that it may call a `RuleCounter` to count the rules of chains in the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeAlias

from msgspec import Struct

from kproxy.iptables.base_rules import base_chains, dispatch_trailing_rules, ensured_rules
from kproxy.iptables.dispatch import lay_out
from kproxy.iptables.foreign_rules import first_blocking_rule, group_by_chain, restore_commands
from kproxy.iptables.held_services import ChainTexts
from kproxy.iptables.ledger import (
    Digest,
    DispatchRecord,
    IptablesLedger,
    IptablesSnapshot,
    PortRecord,
    ServiceRecord,
    changed_dispatch_chains,
    record_chains,
)
from kproxy.iptables.names import CANARIES, DISPATCH_CHAINS, FILTER_FIREWALL, ChainName, deletion_order, is_shard
from kproxy.iptables.patch import make_patch
from kproxy.iptables.render import DispatchRule, RenderedPort
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
PARTIAL_PORT = "/partially-accepted"
"""The key of the record of the new chains of a Service that the kernel accepted only in part. No port has this key."""


class ServiceBlocks(Struct, frozen=True):
    """The changes to the per-Service chains of one Service: usually one, and several for a very large Service.

    They must be applied in this order. The chains to which a chain jumps never come after it.
    """

    key: ServiceKey
    blocks: list[RestoreInput]


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
    the bottom up, and then the dispatch chains. Finally they delete unused chains. If a single Service has more rules
    than that in its per-Service chains, they are also written in several transactions: the endpoint chains first.

    With a `rule_counter`, a long per-Service chain is patched rule by rule, provided that only a few of its rules
    differ and that the chain has the same number of rules in the kernel as in the ledger. All other chains are
    rewritten. In particular, dispatch chains and shards are never patched: iptables-nft can write the 32 rules of a
    shard in less time than it needs to find one rule in a chain of 10,000.

    `patched` maps each patched chain to its Service and to the number of rules that the chain must have after the
    transactions.

    The chains in `force_rewrite` are written even if they match the ledger. `edits` are further commands for individual
    rules, each with its table; they are part of the last transaction that writes rules.

    The Services in `held` keep their existing rules, which the given records describe, whatever `desired` contains. A
    Service with an empty record has no rules. Services may be added while the diff iterates over `desired`. `kept`
    contains the rules of per-Service chains of such Services: the chains are written if they differ.

    Alternatively to `transactions`, a caller may apply the parts of the diff one by one, report each accepted part to
    `accept`, and `hold` a Service whose part the kernel rejects: `base_change`, `service_changes`, `dispatch_changes`
    and `unused_chains`, in this order. `dispatch_changes` may be called several times.
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
        held: dict[ServiceKey, ServiceRecord] | None = None,
        kept: Mapping[ServiceKey, ChainTexts] | None = None,
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
        self._held = held if held is not None else {}
        self._kept = kept if kept is not None else {}
        self._restored: dict[ChainName, Digest] = {}
        self._edits = edits
        self._services: dict[ServiceKey, ServiceRecord] = {}
        self._base: dict[ChainName, Digest] = {}
        self._base_rules: Counter[str] = Counter()
        self._dispatch: dict[ChainName, DispatchRecord] = {}
        self._resolution = ledger.resolution
        self._dispatch_chains: dict[ChainName, str] = {}
        self._unused: dict[ServiceKey, list[ChainName]] = {}
        self._unused_shards: list[ChainName] = []

    def transactions(self) -> Iterator[RestoreInput]:
        """Yield the transactions. There are none if the kernel already has the desired state."""
        current = self._base_change()
        cost = current.cost
        for change in self._chain_changes():
            added = change.cost
            if current and cost + added > self._max_transaction_rules:
                yield current
                current, cost = RestoreInput(), 0
            current.add(change)
            cost += added
        entry = self._entry_change()
        deleted = self.unused_chains()
        # Other tools may have added jumps to stale chains that the snapshot found. The kernel then rejects the deletion
        # of these chains, which must not block the other changes.
        best_effort = self._snapshot is not None
        if cost + entry.cost > self._max_transaction_rules:
            yield from [current] if current else []
            current = entry
        else:
            current.add(entry)
        if not best_effort and current.cost + len(deleted) <= self._max_transaction_rules:
            current.deleted, deleted = deleted, []
        yield from [current] if current else []
        yield from self.deletions(deleted, best_effort=best_effort)

    def deletions(self, chains: Iterable[ChainName], *, best_effort: bool) -> Iterator[RestoreInput]:
        """Yield the transactions that delete unused chains. A chain is deleted before the chains that it jumps to."""
        remaining = iter(sorted(chains, key=deletion_order))
        while batch := list(islice(remaining, self._max_transaction_rules)):
            yield RestoreInput(deleted=batch, best_effort=best_effort)

    def base_change(self) -> RestoreInput:
        """Return the change to the chains that do not depend on Services, including the rules that jump to them."""
        change = self._base_change()
        if self._snapshot is not None:
            missing = {chain: "" for chain in DISPATCH_CHAINS if chain not in self._snapshot.digests}
            change.chains |= missing
            self._ensure_rules(change, self._snapshot)
        return change

    def dispatch_changes(self) -> Iterator[RestoreInput]:
        """Yield the changes to the shards and then to the dispatch chains.

        They take the Services into account that `service_changes` has returned and that are not held.
        """
        current, cost = RestoreInput(), 0
        for shard, rules in self._shard_changes():
            change = RestoreInput({shard: rules})
            if current and cost + change.cost > self._max_transaction_rules:
                yield current
                current, cost = RestoreInput(), 0
            current.add(change)
            cost += change.cost
        entry = RestoreInput(dict(self._dispatch_chains))
        if current and cost + entry.cost > self._max_transaction_rules:
            yield current
            current = RestoreInput()
        current.add(entry)
        yield from [current] if current else []

    def unused_chains(self) -> list[ChainName]:
        """Return the chains that can be deleted after all other changes."""
        unused = [chain for chains in self._unused.values() for chain in chains] + self._unused_shards
        return unused + self._stale_chains()

    def dispatch_rules_of(self, key: ServiceKey) -> list[DispatchRule]:
        """Return the dispatch rules that a Service adds."""
        record = self._services[key] if key in self._services else self._ledger.services.get(key, {})
        return [rule for port in record.values() for rule in port.dispatch]

    def all_services(self) -> set[ServiceKey]:
        """Return the Services that have been compared so far, and all others that have rules."""
        return {*self._services, *self._ledger.services}

    @property
    def services(self) -> Collection[ServiceKey]:
        """The Services that have been compared so far."""
        return self._services.keys()

    def accept(self, change: RestoreInput) -> None:
        """Record that the kernel has accepted a part of the diff that contains no patches."""
        digests = self._snapshot.digests if self._snapshot is not None else self._ledger.deviations
        digests.update({chain: hash(rules) for chain, rules in change.chains.items()})
        if self._snapshot is not None:
            for chain in change.chains.keys() & {*CANARIES, FILTER_FIREWALL}:
                self._snapshot.rules.setdefault(chain, [])

    def kept_blocks(self, key: ServiceKey, record: ServiceRecord) -> list[RestoreInput]:
        """Return the changes that restore the per-Service chains in `record`, a record of a held Service.

        There are none if the chains are intact, or if their rules are unknown.
        """
        kept = self._kept.get(key, {})
        change = RestoreInput()
        for name, digest in record_chains(record) if kept else ():
            chain = ChainName("nat", name)
            if name in kept and (self._existing(chain, digest) != hash(kept[name]) or chain in self._force_rewrite):
                change.chains[chain] = kept[name]
        return self._blocks(change) if change else []

    def hold(self, key: ServiceKey, record: ServiceRecord) -> None:
        """Keep the existing rules of a Service, because the kernel rejects the new ones.

        `record` describes the existing rules. If one of its chains no longer exists, the Service gets no rules.
        """
        # Chains that the kernel accepted in an earlier attempt are candidates again: they may be unused by now.
        record = {name: port for name, port in record.items() if name != PARTIAL_PORT}
        if any(self._existing(ChainName("nat", name), digest) is None for name, digest in record_chains(record)):
            record = {}
        kept = {name for name, _ in record_chains(record)}
        candidates: dict[str, Digest | None] = dict.fromkeys(
            name for name, _ in record_chains(self._services.get(key, {}))
        )
        candidates |= record_chains(self._ledger.services.get(key, {}))
        candidates |= {chain.name: None for chain in self._unused.get(key, ()) if chain.name not in candidates}
        unused = {
            name: existing
            for name, digest in candidates.items()
            if name not in kept and (existing := self._existing(ChainName("nat", name), digest)) is not None
        }
        if any(self._existing(ChainName("nat", name), digest) != digest for name, digest in record_chains(record)):
            # The kernel has accepted some chains that are in use. They may jump to the new ones.
            record = {**record, PARTIAL_PORT: PortRecord.of_digests(unused)}
            unused = {}
        self._unused[key] = [ChainName("nat", name) for name in unused]
        self._held[key] = record
        self._services[key] = record

    def commit(self) -> None:
        """Update the ledger after the kernel has accepted all transactions."""
        deviations, deviating = self._remaining_deviations()
        for key, record in self._services.items():
            self._ledger.put(key, record)
        self._ledger.put_base(self._base, self._base_rules)
        self._ledger.resolution = self._resolution
        self._ledger.dispatch = self._dispatch
        self._ledger.deviations, self._ledger.deviating = deviations, deviating

    def _existing(self, chain: ChainName, recorded: Digest | None) -> Digest | None:
        """Return the digest of a chain in the kernel, or None if it does not exist.

        `recorded` is the digest in the ledger's records.
        """
        if chain in self._restored:
            return self._restored[chain]
        if self._snapshot is not None:
            return self._snapshot.digests.get(chain)
        return self._ledger.existing(chain, recorded)

    def _remaining_deviations(self) -> tuple[dict[ChainName, Digest | None], set[ServiceKey]]:
        """Return the deviations from the records that remain after a commit, and the Services that have them."""
        deviations: dict[ChainName, Digest | None] = {}
        deviating: set[ServiceKey] = set()
        for key in (self._ledger.deviating - self._services.keys()) | self._held.keys():
            record = self._held[key] if key in self._held else self._ledger.services.get(key, {})
            for name, digest in record_chains(record):
                chain = ChainName("nat", name)
                if (existing := self._existing(chain, digest)) != digest:
                    deviations[chain] = existing
                    deviating.add(key)
        return deviations, deviating

    def _base_change(self) -> RestoreInput:
        """Return the change to the Service-independent chains, except the dispatch chains.

        It is part of the first transaction, because per-Service chains jump to some of these chains.
        """
        chains = base_chains(self._context)
        self._base = {chain: hash(rules) for chain, rules in chains.items()}
        for chain, rules in chains.items():
            self._base_rules[chain.table] += count_rules([rules])
        martian_rules = sum(rule.chain == FILTER_FIREWALL for rule in ensured_rules(self._context))
        self._base_rules[FILTER_FIREWALL.table] += martian_rules
        recorded = self._ledger.base
        changed = {
            chain: rules
            for chain, rules in chains.items()
            if self._existing(chain, recorded.get(chain)) != self._base[chain] or chain in self._force_rewrite
        }
        missing = (chain for chain in (*CANARIES, FILTER_FIREWALL) if chain in self._force_rewrite)
        return RestoreInput(changed | dict.fromkeys(missing, ""))

    def _chain_changes(self) -> Iterator[RestoreInput]:
        """Yield the changes to per-Service chains and shards. A change must not be split across transactions."""
        for change in self.service_changes():
            if change.key in self._held:
                chains = (each for block in change.blocks for each in block.chains.items())
                self._restored.update({chain: hash(rules) for chain, rules in chains})
            yield from change.blocks
        yield from (RestoreInput({shard: rules}) for shard, rules in self._shard_changes())

    def service_changes(self) -> Iterator[ServiceBlocks]:
        """Yield the change of each Service whose per-Service chains must change."""
        for key, ports in self._desired:
            if key in self._held:
                yield from self._held_change(key)
                continue
            record = {name: PortRecord.from_rendered(rendered) for name, rendered in ports.items()}
            self._services[key] = record
            old = self._ledger.services.get(key, {})
            accepted = {name: digest for port in old.values() for name, digest in port.chains()}
            change = RestoreInput()
            for name, rendered in ports.items():
                for (chain, digest), rules in zip(record[name].chains(), rendered.chains.values(), strict=True):
                    existing = self._existing(ChainName("nat", chain), accepted.pop(chain, None))
                    if existing != digest or ChainName("nat", chain) in self._force_rewrite:
                        self._add_chain(change, chain, rules, old.get(name))
            if accepted:
                unused = (ChainName("nat", name) for name in accepted)
                self._unused[key] = [chain for chain in unused if self._existing(chain, 0) is not None]
            if change.patches and self._rule_counter is not None:
                # Check here, per Service, whether the patches are applicable. A chain whose patch is not applicable is
                # rewritten, and this affects how many Services fit into a transaction.
                change = change.with_applicable_patches(self._rule_counter(change.patches))
                self.patched |= {chain: (key, patch.new_length) for chain, patch in change.patches.items()}
            if change:
                yield ServiceBlocks(key, self._blocks(change))

    def _held_change(self, key: ServiceKey) -> Iterator[ServiceBlocks]:
        self._services[key] = self._held[key]
        if blocks := self.kept_blocks(key, self._held[key]):
            yield ServiceBlocks(key, blocks)

    def _blocks(self, change: RestoreInput) -> list[RestoreInput]:
        """Split the change of one Service so that each block respects the limit on rules, if possible."""
        if change.cost <= self._max_transaction_rules:
            return [change]
        blocks, cost = [RestoreInput()], 0
        # The sort is stable, and a port's chains are rendered after the chains of the same kind that they jump to.
        for chain in sorted((*change.chains, *change.patches), key=deletion_order, reverse=True):
            patch = change.patches.get(chain)
            part = RestoreInput(patches={chain: patch}) if patch else RestoreInput({chain: change.chains[chain]})
            added = part.cost
            if blocks[-1] and cost + added > self._max_transaction_rules:
                blocks.append(RestoreInput())
                cost = 0
            blocks[-1].add(part)
            cost += added
        return blocks

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
        self._dispatch, self._dispatch_chains, self._unused_shards = {}, {}, []
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
            self._dispatch[dispatch_chain] = DispatchRecord(hash(trailing), digests, layout.non_service_rules)
            self._unused_shards += [chain for chain in accepted if chain not in digests]
            changed = {
                chain: text
                for chain, text in layout.chains.items()
                if self._existing(chain, accepted.get(chain)) != digests[chain] or chain in self._force_rewrite
            }
            if dispatch_chain in changed:
                self._dispatch_chains[dispatch_chain] = changed.pop(dispatch_chain)
            yield from changed.items()
        self._unused_shards += self._abandoned_shards()

    def _abandoned_shards(self) -> list[ChainName]:
        """Return the shards that an earlier call of `dispatch_changes` has written and that are no longer used."""
        if self._snapshot is not None or not self._ledger.deviations:
            return []  # the snapshot contains them
        used = {shard for record in self._dispatch.values() for shard in record.chains}.union(self._unused_shards)
        return [
            chain
            for chain, digest in self._ledger.deviations.items()
            if digest is not None and is_shard(chain) and chain not in used
        ]

    def _dirty_dispatch_chains(self, trailing_rules: Mapping[ChainName, tuple[str, ...]]) -> list[ChainName]:
        """Return the dispatch chains that may change. Copy the records of all other dispatch chains from the ledger."""
        if self._snapshot is not None or any(
            chain in DISPATCH_CHAINS or is_shard(chain) for chain in self._ledger.deviations
        ):
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
