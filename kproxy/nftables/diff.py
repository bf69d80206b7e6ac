"""From what a table holds to what it is to hold: the transactions in between."""

from __future__ import annotations

from itertools import chain as concatenated

from kproxy.model.context import Context
from kproxy.model.types import ServiceKey
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS, base_chains
from kproxy.nftables.elements import SetElement, endpoint_size, numbered, pack_address, pools, set_layout
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.render import RenderedFrontend, RenderedService
from kproxy.nftables.ruleset import NftChain, NftSet
from kproxy.nftables.shared_chains import SharedChain, shared_chains
from kproxy.nftables.snapshot import TableSnapshot
from kproxy.nftables.transaction import Transaction


class IncompatibleTableError(Exception):
    """What the kernel holds cannot be turned into what it is to hold; a new table must take its place."""


class NftablesDiff:
    """Brings a ledger, and with its transactions the kernel, to a new state, Service by Service.

    Services are put in one after the other; `take` returns the transaction for all since the last one, each Service
    whole. With a `view`, the table may hold anything (`ledger` is empty then): what is there already is not written
    again, and what nobody wants is removed in the end. Without one the table holds what the ledger says.
    """

    def __init__(
        self, ledger: NftablesLedger, context: Context, view: TableSnapshot | None = None, *, create: bool = False
    ) -> None:
        """With `create`, there may be no table, or one that is no use: the first transaction makes a new one."""
        self._ledger = ledger
        self._context = context
        self._view = view
        self._create = create
        self._endpoint_size = endpoint_size(context.family)
        self._anew = ledger.context != context
        self._verdicts_changed = False
        self._frontends: dict[bytes, RenderedFrontend | None] = {}
        self._members: dict[tuple[str, bytes], bool] = {}
        self._own: list[tuple[RenderedService | None, RenderedService | None]] = []

    @property
    def size(self) -> int:
        """How many frontends the next transaction changes."""
        return len(self._frontends)

    def put(self, key: ServiceKey, new: RenderedService | None) -> None:
        """Note what a Service is to have; None: nothing."""
        ledger = self._ledger
        old = ledger.services.get(key)
        if old == new:
            return
        if old is not None:
            for frontend in old.frontends:
                self._touch(frontend.key)
                ledger.give_up(frontend)
            self._count(old, -1)
            del ledger.services[key]
        if new is not None:
            for frontend in new.frontends:
                self._touch(frontend.key)
                ledger.claim(frontend)
            self._count(new, 1)
            ledger.services[key] = new
        if (old and (old.chains or old.sets)) or (new and (new.chains or new.sets)):
            self._own.append((old, new))

    def take(self) -> Transaction:
        """Return the transaction for what was put in since the last one."""
        done = Transaction()
        anew = self._anew
        self._anew = False
        if anew:
            self._begin(done)
        for key, before in self._frontends.items():
            self._change_frontend(done, key, before, self._ledger.holder(key))
        for (name, key), present in self._members.items():
            self._change_member(done, name, key, before=present, after=self._ledger.members[name][key] > 0)
        for old, new in self._own:
            self._change_own(done, old, new)
        if anew or self._verdicts_changed:
            self._change_shared(done, everything=anew)
            self._verdicts_changed = False
        self._frontends, self._members, self._own = {}, {}, []
        return done

    def finish(self) -> Transaction:
        """Return the last transaction, after which nothing is left that nobody wants."""
        done = self.take()
        view = self._view
        if view is not None:
            for name, elements in view.elements.items():
                for element in elements.values():
                    done.remove(name, element)
            wanted = {chain.name for chain in concatenated(self._ledger.chains.values(), self._ledger.own_chains())}
            stale = [name for name in view.chains if name not in wanted]
            done.flushed += stale
            done.deleted_chains += stale
            sets = {each.name for each in concatenated(SETS, self._ledger.own_sets())}
            done.deleted_sets += [name for name in view.sets if name not in sets]
            self._view = None
        self._ledger.context = self._context
        return done

    # Putting in

    def _touch(self, key: bytes) -> None:
        if key not in self._frontends:
            self._frontends[key] = self._ledger.holder(key)

    def _count(self, service: RenderedService, by: int) -> None:
        self._count_member(names.CLUSTER_IPS, service.cluster_ip, by)
        for key in service.hairpins:
            self._count_member(names.HAIRPINS, key, by)

    def _count_member(self, name: str, key: bytes, by: int) -> None:
        counts = self._ledger.members[name]
        before = counts[key]
        self._members.setdefault((name, key), before > 0)
        if before + by:
            counts[key] = before + by
        else:
            del counts[key]

    # Elements

    def _change_frontend(
        self, done: Transaction, key: bytes, before: RenderedFrontend | None, after: RenderedFrontend | None
    ) -> None:
        self._count_verdicts(before, -1)
        self._count_verdicts(after, 1)
        verdicts = _verdicts(after) if after else {}
        new_pools = dict(after.pools) if after else {}
        old_verdicts, old_pools = self._held(done, key, before, new_pools)
        for name in old_verdicts | verdicts:
            _change_element(done, name, old_verdicts.get(name), verdicts.get(name))
        for name in old_pools | new_pools:
            self._change_pool(done, name, key, old_pools.get(name, b""), new_pools.get(name, b""))

    def _held(
        self, done: Transaction, key: bytes, before: RenderedFrontend | None, wanted: dict[str, bytes]
    ) -> tuple[dict[str, SetElement], dict[str, bytes]]:
        """Return what the kernel has under a frontend's key: in maps of verdicts, and in maps of endpoints."""
        if before is not None:
            verdicts, found = _verdicts(before), dict(before.pools)
        else:
            verdicts, found = {}, {}
        if self._view is not None:
            # What was there before all of this: only the first frontend that claims a key finds anything.
            self._view.take_frontend(key, verdicts, found)
            self._clear_way(done, self._view, key, wanted)
        return verdicts, found

    def _clear_way(self, done: Transaction, view: TableSnapshot, key: bytes, wanted: dict[str, bytes]) -> None:
        """Remove endpoints that have numbers of those wanted: others have left them, behind a gap in their numbers."""
        for name, pool in wanted.items():
            elements = view.elements.get(name, {})
            for place in range(len(pool) // self._endpoint_size):
                if (stray := elements.pop(numbered(key, place), None)) is not None:
                    done.remove(name, stray)

    def _change_pool(self, done: Transaction, name: str, key: bytes, old: bytes, new: bytes) -> None:
        if old == new:
            return
        size = self._endpoint_size
        if not old:
            done.pools.setdefault(name, []).extend(pools(key, new, size))
            return
        for place, begin in enumerate(range(0, max(len(old), len(new)), size)):
            had, wanted = old[begin : begin + size], new[begin : begin + size]
            if had != wanted:
                number = numbered(key, place)
                before, after = SetElement(number, had) if had else None, SetElement(number, wanted) if wanted else None
                _change_element(done, name, before, after)

    def _change_member(self, done: Transaction, name: str, key: bytes, *, before: bool, after: bool) -> None:
        """Change an element of a set: it is there, or it is not."""
        old = SetElement(key) if before else None
        if old is None and self._view is not None:
            old = self._view.elements.get(name, {}).pop(key, None)
        _change_element(done, name, old, SetElement(key) if after else None)

    def _count_verdicts(self, frontend: RenderedFrontend | None, by: int) -> None:
        verdicts = self._ledger.verdicts
        for _, verdict in frontend.verdicts if frontend else ():
            verdicts[verdict] += by
            if not verdicts[verdict]:
                del verdicts[verdict]
            self._verdicts_changed |= verdicts[verdict] in {0, by}

    # Chains and sets

    def _begin(self, done: Transaction) -> None:
        """Make what is there whatever the Services are."""
        context, ledger = self._context, self._ledger
        if self._create:
            done.create = done.replace = True
            done.sets += SETS
        elif self._view is not None:
            done.sets += [each for each in SETS if each.name not in self._view.sets]
        for chain in base_chains(context):
            self._change_chain(done, ledger.chains.get(chain.name), chain)
            ledger.chains[chain.name] = chain
        addresses = context.node_port_addresses or ()
        wanted = tuple(map(pack_address, addresses))
        for key in dict.fromkeys((*ledger.node_port_ips, *wanted)):
            present = key in ledger.node_port_ips
            self._change_member(done, names.NODE_PORT_IPS, key, before=present, after=key in wanted)
        ledger.node_port_ips = wanted

    def _change_shared(self, done: Transaction, *, everything: bool) -> None:
        """Make the shared chains that some element goes to now, and remove those that none does any more."""
        ledger = self._ledger
        wanted = {each.name: each for each in shared_chains(ledger.verdicts)}
        present = {name for name in ledger.chains if SharedChain.named(name)}
        for name, shared in wanted.items():
            if everything or name not in present:
                chain = shared.chain(self._context)
                self._change_chain(done, ledger.chains.get(name), chain)
                ledger.chains[name] = chain
        for name in present - wanted.keys():
            chain = ledger.chains.pop(name)
            if self._view is None:  # else it goes in the end: what is yet to be taken over may lead to it
                self._change_chain(done, chain, None)

    def _change_own(self, done: Transaction, old: RenderedService | None, new: RenderedService | None) -> None:
        old_sets = {each.name: each for each in old.sets} if old else {}
        new_sets = {each.name: each for each in new.sets} if new else {}
        replaced = {name for name in old_sets.keys() & new_sets.keys() if old_sets[name] != new_sets[name]}
        for each in new_sets.values():
            if each.name in replaced or each.name not in old_sets:
                self._make_set(done, each, replaced=each.name in replaced)
        done.deleted_sets += old_sets.keys() - new_sets.keys()
        old_chains = {chain.name: chain for chain in old.chains} if old else {}
        new_chains = {chain.name: chain for chain in new.chains} if new else {}
        for name in old_chains | new_chains:
            self._change_chain(done, old_chains.get(name), new_chains.get(name), anew=bool(replaced))

    def _make_set(self, done: Transaction, wanted: NftSet, *, replaced: bool) -> None:
        """Make a set, unless a table taken over has it: the clients that it remembers stay with their endpoint."""
        present = self._view.sets.get(wanted.name) if self._view is not None else None
        if present is not None:
            if present == set_layout(wanted, self._context.family):
                return
            replaced = True
        if replaced:
            done.deleted_sets.append(wanted.name)
        done.sets.append(wanted)

    def _change_chain(
        self, done: Transaction, old: NftChain | None, new: NftChain | None, *, anew: bool = False
    ) -> None:
        """Write a chain if it differs, or with `anew` in any case, since what its rules refer to is replaced."""
        if new is None:
            assert old is not None
            done.flushed.append(old.name)
            done.deleted_chains.append(old.name)
            return
        if old is not None and old.rules == new.rules and not anew:
            return
        if self._is_there(new, known=old is not None):
            done.flushed.append(new.name)
        else:
            done.chains.append(new)
        done.rules.append(new)

    def _is_there(self, chain: NftChain, *, known: bool) -> bool:
        """Return whether the table has a chain; if it is being taken over, it has it from now on."""
        if self._view is None:
            return known
        known = chain.name in self._view.chains
        if self._view.chains.setdefault(chain.name, chain.hook) != chain.hook:
            raise IncompatibleTableError(f"chain {chain.name} has another hook")
        return known


def _change_element(done: Transaction, name: str, old: SetElement | None, new: SetElement | None) -> None:
    if old == new:
        return
    if old is not None:
        done.remove(name, old)
    if new is not None:
        done.add(name, new)


def _verdicts(frontend: RenderedFrontend) -> dict[str, SetElement]:
    comment = names.comment(frontend.owner)
    return {name: SetElement(frontend.key, verdict, comment) for name, verdict in frontend.verdicts}
