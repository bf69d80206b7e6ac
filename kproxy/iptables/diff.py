"""From what is held and what is wanted to the smallest safe series of transactions.

Pure, but that it may ask how many rules a chain has in the kernel (`Lengths`), by what it is given for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from itertools import islice

from kproxy.iptables.base_rules import base_chains, dispatch_tails, ensured_rules
from kproxy.iptables.dispatch import lay_out
from kproxy.iptables.ledger import (
    Digest,
    DispatchRecord,
    IptablesLedger,
    IptablesSnapshot,
    PortRecord,
    ServiceRecord,
    dispatch_differs,
)
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName, deletion_order
from kproxy.iptables.patch import patch
from kproxy.iptables.render import RenderedPort
from kproxy.iptables.save_restore import RestoreInput, count_rules
from kproxy.model.context import Context
from kproxy.model.types import ServiceKey

Wanted = Iterable[tuple[ServiceKey, Mapping[str, RenderedPort]]]
"""The Services that may have changed with their rules by port: no ports for a Service that is gone.

It is consumed as transactions are asked for, so that the rules of a large cluster are never all in memory.
"""


Lengths = Callable[[Collection[ChainName]], Mapping[ChainName, int]]
"""Tells how many rules chains have in the kernel, as far as that can be told."""


class IptablesDiff:
    """The way from what a ledger says to what is wanted, as transactions to make in their order.

    With a `kernel` view (at start, after a failure) the ledger is empty, `wanted` is complete, and what the view
    shows decides what must be written, ensured and deleted.

    A change of more than `block_rules` rules is cut into transactions that are safe one by one: first the chains
    that belong to one Service each, then the shards of dispatch chains from the bottom to the top, then the dispatch
    chains themselves, last the deletion of what nothing leads to any more. iptables-nft needs time that grows with
    the square of the rules in one transaction. Dispatch chains of more than `dispatch_threshold` rules are split.

    With `lengths`, single rules of long chains of a port change if few of them differ, and the kernel has as many as
    the ledger; other chains are always written anew: for iptables-nft to find one rule among 10,000 takes longer than
    to write the 32 of a shard. `patched` are those chains, and how many rules they have when the transactions are made.

    Chains of ports that are `doubted` are written whatever the ledger says.
    """

    def __init__(
        self,
        ledger: IptablesLedger,
        kernel: IptablesSnapshot | None,
        wanted: Wanted,
        context: Context,
        *,
        block_rules: int,
        dispatch_threshold: int,
        lengths: Lengths | None = None,
        doubted: Container[ChainName] = (),
    ) -> None:
        self.patched: dict[ChainName, tuple[ServiceKey, int]] = {}
        self._ledger = ledger
        self._kernel = kernel
        self._wanted = wanted
        self._context = context
        self._block_rules = block_rules
        self._dispatch_threshold = dispatch_threshold
        self._lengths = lengths
        self._doubted = doubted
        self._services: dict[ServiceKey, ServiceRecord] = {}
        self._base: dict[ChainName, Digest] = {}
        self._base_rules: Counter[str] = Counter()
        self._dispatch: dict[ChainName, DispatchRecord] = {}
        self._settlement = ledger.settlement
        self._tops: dict[ChainName, str] = {}
        self._deleted: list[ChainName] = []

    def transactions(self) -> Iterator[RestoreInput]:
        """Yield the transactions; none at all if the kernel already holds what is wanted."""
        block = RestoreInput(self._groundwork())
        filled = block.rules
        for writes in self._unswitched():
            added = writes.rules
            if block and filled + added > self._block_rules:
                yield block
                block, filled = RestoreInput(), 0
            block.chains |= writes.chains
            block.patches |= writes.patches
            filled += added
        switch = self._switch()
        self._deleted += self._stale_chains()
        # After a failure nobody knows who else jumps to a chain that is to go: that must not hold up the rest.
        apart = self._kernel is not None
        if filled + switch.rules > self._block_rules:
            yield from [block] if block else []
            block = switch
        else:
            block.chains |= switch.chains
            block.edits = switch.edits
        if not apart and block.rules + len(self._deleted) <= self._block_rules:
            block.deleted, self._deleted = self._deleted, []
        yield from [block] if block else []
        gone = iter(sorted(self._deleted, key=deletion_order))
        while batch := list(islice(gone, self._block_rules)):
            yield RestoreInput(deleted=batch, may_fail=apart)

    def commit(self) -> None:
        """Write into the ledger what the kernel holds once it has accepted every transaction."""
        for key, record in self._services.items():
            self._ledger.put(key, record)
        self._ledger.put_base(self._base, self._base_rules)
        self._ledger.settlement = self._settlement
        self._ledger.dispatch = self._dispatch

    def _groundwork(self) -> dict[ChainName, str]:
        """Return the chains that those of the Services jump to, where they differ."""
        chains = base_chains(self._context)
        self._base = {chain: hash(rules) for chain, rules in chains.items()}
        for chain, rules in chains.items():
            self._base_rules[chain.table] += count_rules([rules])
        martians = sum(rule.chain == FILTER_FIREWALL for rule in ensured_rules(self._context))
        self._base_rules[FILTER_FIREWALL.table] += martians
        held = self._kernel.ours if self._kernel else self._ledger.base
        return {chain: rules for chain, rules in chains.items() if held.get(chain) != self._base[chain]}

    def _unswitched(self) -> Iterator[RestoreInput]:
        """Yield what is to be done before the switch, in parts that belong into one transaction each."""
        yield from self._port_chains()
        yield from (RestoreInput({shard: text}) for shard, text in self._shards())

    def _port_chains(self) -> Iterator[RestoreInput]:
        """Yield, Service by Service, the chains to write; a Service's own chains always change together."""
        for key, ports in self._wanted:
            record = {name: PortRecord.of(rendered) for name, rendered in ports.items()}
            self._services[key] = record
            old = self._ledger.services.get(key, {})
            held = {name: digest for port in old.values() for name, digest in port.chains()}
            writes = RestoreInput()
            for name, rendered in ports.items():
                for (chain, digest), rules in zip(record[name].chains(), rendered.chains.values(), strict=True):
                    known = held.pop(chain, None)
                    if self._kernel is not None:
                        known = self._kernel.ours.get(ChainName("nat", chain))
                    if known != digest or ChainName("nat", chain) in self._doubted:
                        self._write(writes, chain, rules, old.get(name))
            self._deleted += [ChainName("nat", name) for name in held]
            if writes.patches and self._lengths is not None:
                # Now, and not for a whole transaction: what has to be written anew counts for the size of that.
                writes = writes.settled(self._lengths(writes.patches))
                self.patched |= {chain: (key, edits.new_length) for chain, edits in writes.patches.items()}
            if writes:
                yield writes

    def _write(self, writes: RestoreInput, name: str, rules: str, old: PortRecord | None) -> None:
        """Add what gives a chain of a port its rules: a patch where it is known and long, else all of them."""
        chain = ChainName("nat", name)
        held = old.rules_of(name) if old is not None and self._lengths is not None else ()
        if held and (edits := patch(name, held, rules)) is not None:
            writes.patches[chain] = edits
        else:
            writes.chains[chain] = rules

    def _shards(self) -> Iterator[tuple[ChainName, str]]:
        """Yield, one by one, the shards to write; the dispatch chains themselves are kept for the switch."""
        tails = dispatch_tails(self._context)
        self._settlement = self._ledger.settle(self._context.family, self._services)
        left_out = self._settlement.left_out
        for top, claimed in self._ledger.dispatch_rules(self._dirty_dispatch(tails), self._services).items():
            tail = tails[top]
            rules = [rule for rule in claimed if rule not in left_out] if left_out else claimed
            layout = lay_out(top, rules, tail, self._context.family, self._dispatch_threshold)
            digests = {chain: hash(text) for chain, text in layout.chains.items()}
            former = self._ledger.dispatch[top].chains if top in self._ledger.dispatch else {}
            held = self._kernel.ours if self._kernel else former
            self._dispatch[top] = DispatchRecord(hash(tail), digests, layout.own)
            self._deleted += [chain for chain in former if chain not in digests]
            writes = {chain: text for chain, text in layout.chains.items() if held.get(chain) != digests[chain]}
            if top in writes:
                self._tops[top] = writes.pop(top)
            yield from writes.items()

    def _dirty_dispatch(self, tails: Mapping[ChainName, tuple[str, ...]]) -> list[ChainName]:
        """Return the dispatch chains that may change; the records of the others stay as they are."""
        if self._kernel is not None:
            return list(tails)
        dirty: set[ChainName] = set()
        for key, record in self._services.items():
            dirty |= dispatch_differs(self._ledger.services.get(key, {}), record)
        dirty |= {rule.chain for rule in self._settlement.left_out ^ self._ledger.settlement.left_out}
        for chain, accepted in self._ledger.dispatch.items():
            if chain not in dirty and accepted.tail == hash(tails[chain]):
                self._dispatch[chain] = accepted
        return [chain for chain in tails if chain not in self._dispatch]

    def _switch(self) -> RestoreInput:
        """Return the change of the chains and rules that lead packets to all others."""
        switch = RestoreInput(dict(self._tops))
        if self._kernel is not None:
            self._ensure(switch, self._kernel)
        return switch

    def _ensure(self, switch: RestoreInput, kernel: IptablesSnapshot) -> None:
        for chain in (*CANARIES, FILTER_FIREWALL):
            if chain not in kernel.shared:
                switch.chains[chain] = ""
        # Each goes to the top, so the last one in is the first one met.
        for rule in reversed(ensured_rules(self._context)):
            held = kernel.shared.get(rule.chain, [])
            if not rule.is_met_by_one_of(held):
                switch.edits.append((rule.chain.table, f"-I {rule.chain.name} 1 {rule.rule}"))
            # Two proxies that started at the same time may each have put it in.
            surplus = held.count(rule.text) - 1
            switch.edits += [(rule.chain.table, f"-D {rule.chain.name} {rule.rule}")] * surplus

    def _stale_chains(self) -> list[ChainName]:
        if self._kernel is None:
            return []
        used = (name for record in self._services.values() for port in record.values() for name, _ in port.chains())
        shards = {shard for record in self._dispatch.values() for shard in record.chains}
        return self._kernel.stale_chains(used, shards)
