"""Compute the transactions that change the table from its current state to the desired state. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as concatenated

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.types import ServiceKey
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS, base_chains, base_sets
from kproxy.nftables.comments import comment_of
from kproxy.nftables.elements import (
    SetElement,
    endpoint_elements,
    endpoint_key,
    endpoint_size,
    pack_address,
    set_layout,
)
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import RenderedFrontend, RenderedService
from kproxy.nftables.ruleset import NftChain, NftSet
from kproxy.nftables.shared_chains import SharedChain, required_shared_chains
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction


class IncompatibleTableError(Exception):
    """The existing table cannot be changed to the desired state. It must be replaced by a new table."""


class Batch(Struct, frozen=True):
    """A transaction, and what `NftablesDiff.roll_back` needs to take it back.

    `before` contains the state of each changed Service before the transaction. If the transaction changes what depends
    only on the context, `chains` and `node_port_ips` are those of the ledger before the transaction.
    """

    transaction: Transaction
    before: dict[ServiceKey, RenderedService | None]
    chains: dict[str, NftChain] | None = None
    node_port_ips: tuple[bytes, ...] = ()


class NftablesDiff:
    """Collects changed Services and returns the transactions that program them. It also updates the ledger.

    Call `put` for each Service. `next_transaction` returns a transaction for all Services put since the previous
    transaction, so a Service is never split across transactions. `last_transaction` does the same and also deletes
    obsolete objects.

    Without a `snapshot`, the ledger describes the current table. With a `snapshot`, the ledger must be empty and the
    snapshot describes the current table, whatever its contents. Sets and elements that already match are not written
    again. The rules of all chains are rewritten, because a snapshot does not contain rules.
    """

    def __init__(
        self, ledger: NftablesLedger, context: Context, snapshot: TableSnapshot | None = None, *, create: bool = False
    ) -> None:
        """Create a diff. With `create`, its first transaction deletes any existing table and creates a new one."""
        self._ledger = ledger
        self._context = context
        self._snapshot = snapshot
        self._create = create
        self._endpoint_size = endpoint_size(context.family)
        self._context_changed = ledger.context != context
        self._verdicts_changed = False
        # The state, after the previous transaction, of everything that the next transaction may change: the owner of
        # each frontend, by frontend key, and whether each reference-counted element existed. For each Service that has
        # or had its own chains or sets, the new state is stored with the old one.
        self._frontends: dict[bytes, RenderedFrontend | None] = {}
        self._counted_elements: dict[tuple[str, bytes], bool] = {}
        self._services_with_chains: list[tuple[RenderedService | None, RenderedService | None]] = []
        self._before: dict[ServiceKey, RenderedService | None] = {}

    @property
    def context_changed(self) -> bool:
        """Whether the next transaction changes what depends only on the context."""
        return self._context_changed

    @property
    def creates_table(self) -> bool:
        """Whether the next transaction creates the table."""
        return self._create and self._context_changed

    @property
    def frontend_count(self) -> int:
        """The number of frontends that the next transaction may change."""
        return len(self._frontends)

    def put(self, key: ServiceKey, new: RenderedService | None) -> None:
        """Set the desired state of a Service. None deletes it."""
        ledger = self._ledger
        old = ledger.services.get(key)
        if old == new:
            return
        self._before.setdefault(key, old)
        if old is not None:
            for frontend in old.frontends:
                self._note_owner(frontend.key)
                ledger.remove_claim(frontend)
            self._count_elements(old, -1)
            del ledger.services[key]
        if new is not None:
            for frontend in new.frontends:
                self._note_owner(frontend.key)
                ledger.add_claim(frontend)
            self._count_elements(new, 1)
            ledger.services[key] = new
        if (old and (old.chains or old.sets)) or (new and (new.chains or new.sets)):
            self._services_with_chains.append((old, new))

    def next_transaction(self) -> Transaction:
        """Return a transaction for the Services that were put since the previous transaction.

        Raises `IncompatibleTableError` if a chain of the snapshot has a different hook than the desired chain.
        """
        transaction = Transaction()
        context_changed, self._context_changed = self._context_changed, False
        if context_changed:
            self._change_base_table(transaction)
        for key, old in self._frontends.items():
            self._change_frontend(transaction, key, old, self._ledger.owner(key))
        for (set_name, key), existed in self._counted_elements.items():
            needed = self._ledger.element_references[set_name][key] > 0
            self._change_plain_element(transaction, set_name, key, exists=existed, needed=needed)
        for old_service, new_service in self._services_with_chains:
            self._change_service_chains(transaction, old_service, new_service)
        if context_changed or self._verdicts_changed:
            self._change_shared_chains(transaction, rewrite=context_changed)
            self._verdicts_changed = False
        self._frontends, self._counted_elements, self._services_with_chains, self._before = {}, {}, [], {}
        return transaction

    def next_batch(self) -> Batch:
        """Return `next_transaction` with what is needed to take it back.

        Only for a diff without a snapshot. The caller sets `NftablesLedger.context` after the last batch.
        """
        before = self._before
        if not self._context_changed:
            return Batch(self.next_transaction(), before)
        chains, node_port_ips = dict(self._ledger.chains), self._ledger.node_port_ips
        return Batch(self.next_transaction(), before, chains, node_port_ips)

    def roll_back(self, batches: Sequence[Batch]) -> list[dict[ServiceKey, RenderedService | None]]:
        """Take back the latest batches, oldest first, which the kernel has not applied, and restore the ledger.

        Return the state of the changed Services after each of the batches.
        """
        after = [{key: self._ledger.services.get(key) for key in batch.before} for batch in batches]
        for batch in reversed(batches):
            for key, old in batch.before.items():
                self.put(key, old)
        self.next_transaction()  # discarded: it restores the verdict counts and the shared chains
        oldest = batches[0]
        if oldest.chains is not None:
            self._ledger.chains, self._ledger.node_port_ips = dict(oldest.chains), oldest.node_port_ips
            self._context_changed = True
        return after

    def last_transaction(self) -> Transaction:
        """Return the last transaction. It also deletes all objects of the snapshot that are not desired.

        Raises `IncompatibleTableError` if a chain of the snapshot has a different hook than the desired chain.
        """
        transaction = self.next_transaction()
        snapshot, ledger = self._snapshot, self._ledger
        if snapshot is not None:
            for set_name, elements in snapshot.elements.items():
                for element in elements.values():
                    transaction.delete_element(set_name, element)
            desired_chains = {chain.name for chain in concatenated(ledger.chains.values(), ledger.service_chains())}
            obsolete = [name for name in snapshot.chains if name not in desired_chains]
            transaction.flushed_chains += obsolete
            transaction.deleted_chains += obsolete
            desired_sets = {each.name for each in concatenated(SETS, ledger.service_sets())}
            transaction.deleted_sets += [name for name in snapshot.sets if name not in desired_sets]
            self._snapshot = None
        ledger.context = self._context
        return transaction

    # State before the next transaction

    def _note_owner(self, key: bytes) -> None:
        if key not in self._frontends:
            self._frontends[key] = self._ledger.owner(key)

    def _count_elements(self, service: RenderedService, by: int) -> None:
        self._count_element(names.CLUSTER_IPS, service.cluster_ip, by)
        for key in service.hairpins:
            self._count_element(names.HAIRPINS, key, by)

    def _count_element(self, set_name: str, key: bytes, by: int) -> None:
        references = self._ledger.element_references[set_name]
        count = references[key]
        self._counted_elements.setdefault((set_name, key), count > 0)
        if count + by:
            references[key] = count + by
        else:
            del references[key]

    # Elements

    def _change_frontend(
        self, transaction: Transaction, key: bytes, old: RenderedFrontend | None, new: RenderedFrontend | None
    ) -> None:
        self._count_verdicts(old, -1)
        self._count_verdicts(new, 1)
        if new is not None and old is None and self._snapshot is None:
            self._add_frontend(transaction, new)
            return
        new_verdicts = _verdict_elements(new) if new else {}
        new_endpoints = dict(new.endpoints) if new else {}
        old_verdicts, old_endpoints = self._current_elements(key, old)
        for map_name in old_verdicts | new_verdicts:
            _change_element(transaction, map_name, old_verdicts.get(map_name), new_verdicts.get(map_name))
        for map_name in old_endpoints | new_endpoints:
            self._change_endpoints(
                transaction, map_name, key, old_endpoints.get(map_name, b""), new_endpoints.get(map_name, b"")
            )

    def _add_frontend(self, transaction: Transaction, new: RenderedFrontend) -> None:
        """Add all elements of a frontend that has none in the kernel."""
        comment = comment_of(new.service_port)
        for map_name, verdict in new.verdicts:
            transaction.add_element(map_name, SetElement(new.key, verdict, comment))
        for map_name, values in new.endpoints:
            if values:
                runs = transaction.added_endpoints.setdefault(map_name, [])
                runs += endpoint_elements(new.key, values, self._endpoint_size)

    def _current_elements(
        self, key: bytes, old: RenderedFrontend | None
    ) -> tuple[dict[str, SetElement], dict[str, bytes]]:
        """Return the elements that a frontend currently has in the kernel, and remove them from any snapshot.

        The first dictionary contains the verdict elements, and the second one contains the concatenated values of the
        endpoint elements. Both are keyed by map name. Endpoint elements behind a missing index stay in the snapshot;
        `last_transaction` deletes what is left there.
        """
        if old is not None:
            verdicts, endpoints = _verdict_elements(old), dict(old.endpoints)
        else:
            verdicts, endpoints = {}, {}
        if self._snapshot is not None:
            # `pop_frontend` removes the elements from the snapshot. If a later transaction changes the frontend again,
            # the snapshot has none of its elements, and `old` describes them.
            self._snapshot.pop_frontend(key, verdicts, endpoints)
        return verdicts, endpoints

    def _change_endpoints(self, transaction: Transaction, map_name: str, key: bytes, old: bytes, new: bytes) -> None:
        if old == new:
            return
        size = self._endpoint_size
        if not old:
            transaction.added_endpoints.setdefault(map_name, []).extend(endpoint_elements(key, new, size))
            return
        for index, begin in enumerate(range(0, max(len(old), len(new)), size)):
            old_value, new_value = old[begin : begin + size], new[begin : begin + size]
            if old_value != new_value:
                element_key = endpoint_key(key, index)
                old_element = SetElement(element_key, old_value) if old_value else None
                new_element = SetElement(element_key, new_value) if new_value else None
                _change_element(transaction, map_name, old_element, new_element)

    def _change_plain_element(
        self, transaction: Transaction, set_name: str, key: bytes, *, exists: bool, needed: bool
    ) -> None:
        """Add or delete an element that has a key, but no value and no comment."""
        old = SetElement(key) if exists else None
        if old is None and self._snapshot is not None:
            old = self._snapshot.elements.get(set_name, {}).pop(key, None)
        _change_element(transaction, set_name, old, SetElement(key) if needed else None)

    def _count_verdicts(self, frontend: RenderedFrontend | None, by: int) -> None:
        counts = self._ledger.verdict_counts
        for _, verdict in frontend.verdicts if frontend else ():
            counts[verdict] += by
            if not counts[verdict]:
                del counts[verdict]
            self._verdicts_changed |= counts[verdict] in {0, by}

    # Chains and sets

    def _change_base_table(self, transaction: Transaction) -> None:
        """Create or change all objects that depend only on the context."""
        context, ledger = self._context, self._ledger
        if self._create:
            transaction.create_table = transaction.replace_table = True
            transaction.added_sets += base_sets(context)
        elif self._snapshot is not None:
            transaction.added_sets += [each for each in base_sets(context) if each.name not in self._snapshot.sets]
        for chain in base_chains(context):
            self._change_chain(transaction, ledger.chains.get(chain.name), chain)
            ledger.chains[chain.name] = chain
        node_port_ips = tuple(map(pack_address, context.node_port_addresses or ()))
        for key in dict.fromkeys((*ledger.node_port_ips, *node_port_ips)):
            exists, needed = key in ledger.node_port_ips, key in node_port_ips
            self._change_plain_element(transaction, names.NODE_PORT_IPS, key, exists=exists, needed=needed)
        ledger.node_port_ips = node_port_ips

    def _change_shared_chains(self, transaction: Transaction, *, rewrite: bool) -> None:
        """Create missing shared chains and delete unused ones. With `rewrite`, also update the existing ones."""
        ledger = self._ledger
        needed = {each.name: each for each in required_shared_chains(ledger.verdict_counts)}
        existing = {name for name in ledger.chains if SharedChain.parse(name)}
        for name, shared in needed.items():
            if rewrite or name not in existing:
                chain = shared.render(self._context)
                self._change_chain(transaction, ledger.chains.get(name), chain)
                ledger.chains[name] = chain
        for name in existing - needed.keys():
            chain = ledger.chains.pop(name)
            # With a snapshot, old elements may still refer to the chain. `last_transaction` deletes both.
            if self._snapshot is None:
                self._change_chain(transaction, chain, None)

    def _change_service_chains(
        self, transaction: Transaction, old: RenderedService | None, new: RenderedService | None
    ) -> None:
        """Change the chains and sets of one Service from its old state to its new state."""
        old_sets = {each.name: each for each in old.sets} if old else {}
        new_sets = {each.name: each for each in new.sets} if new else {}
        replaced = {name for name in old_sets.keys() & new_sets.keys() if old_sets[name] != new_sets[name]}
        for each in new_sets.values():
            if each.name in replaced or each.name not in old_sets:
                self._add_set(transaction, each, replace=each.name in replaced)
        transaction.deleted_sets += old_sets.keys() - new_sets.keys()
        old_chains = {chain.name: chain for chain in old.chains} if old else {}
        new_chains = {chain.name: chain for chain in new.chains} if new else {}
        for name in old_chains | new_chains:
            # A rule refers to a set object, not to its name. Rules that use a replaced set must be rewritten.
            self._change_chain(transaction, old_chains.get(name), new_chains.get(name), rewrite=bool(replaced))

    def _add_set(self, transaction: Transaction, desired: NftSet, *, replace: bool) -> None:
        """Create a set, unless the snapshot has it with the desired layout.

        Keeping an existing set preserves the session affinity of current clients. With `replace`, or if the set in the
        snapshot has a different layout, the existing set is deleted first.
        """
        existing = self._snapshot.sets.get(desired.name) if self._snapshot is not None else None
        if existing is not None:
            if existing == set_layout(desired, self._context.family):
                return
            replace = True
        if replace:
            transaction.deleted_sets.append(desired.name)
        transaction.added_sets.append(desired)

    def _change_chain(
        self, transaction: Transaction, old: NftChain | None, new: NftChain | None, *, rewrite: bool = False
    ) -> None:
        """Create, change or delete a chain. If its rules have not changed, write it only with `rewrite`."""
        if new is None:
            assert old is not None
            transaction.flushed_chains.append(old.name)
            transaction.deleted_chains.append(old.name)
            return
        if old is not None and old.rules == new.rules and not rewrite:
            return
        if self._chain_exists(new, in_ledger=old is not None):
            transaction.flushed_chains.append(new.name)
        else:
            transaction.added_chains.append(new)
        transaction.added_rules.append(new)

    def _chain_exists(self, chain: NftChain, *, in_ledger: bool) -> bool:
        """Return whether the table has a chain. If there is a snapshot, add a missing chain to the snapshot.

        Raises `IncompatibleTableError` if the chain in the snapshot has a different hook than the desired chain.
        """
        if self._snapshot is None:
            return in_ledger
        exists = chain.name in self._snapshot.chains
        if self._snapshot.chains.setdefault(chain.name, chain.hook) != chain.hook:
            raise IncompatibleTableError(f"chain {chain.name} has a different hook")
        return exists


def _change_element(transaction: Transaction, set_name: str, old: SetElement | None, new: SetElement | None) -> None:
    if old == new:
        return
    if old is not None:
        transaction.delete_element(set_name, old)
    if new is not None:
        transaction.add_element(set_name, new)


def _verdict_elements(frontend: RenderedFrontend) -> dict[str, SetElement]:
    comment = comment_of(frontend.service_port)
    return {map_name: SetElement(frontend.key, verdict, comment) for map_name, verdict in frontend.verdicts}
