"""The chains and sets of single Services in an existing table, read as far as they are needed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.comments import comment_of
from kproxy.nftables.elements import set_layout
from kproxy.nftables.rule_content import RuleContent
from kproxy.nftables.rule_decoder import decode_rule
from kproxy.nftables.ruleset import Drop, Goto, Jump, KeyField, Lookup, NftChain, NftRule, NftSet, Statement, UpdateSet
from kproxy.nftables.snapshot import TableSnapshot

_FIREWALL = "firewall"
_COMMENTS = {"local": ", policy Local", "external": ", external traffic"}
"""What the comment of a chain says in addition to the service port, by the kind of the chain."""
ReadRules = Callable[[str], Sequence[RuleContent]]
"""Returns the rules of a chain in the kernel. Raises `kproxy.nftables.kernel.TableError`."""


class ServiceChains(Struct):
    """Chains of one Service, each after the chains that its rules refer to, and the sets that their rules use."""

    chains: dict[str, NftChain] = {}
    sets: dict[str, NftSet] = {}

    def add(self, others: ServiceChains) -> None:
        """Add other chains and sets of the Service."""
        self.chains |= others.chains
        self.sets |= others.sets

    def rules(self) -> Iterator[NftRule]:
        """Yield the rules of all chains."""
        for chain in self.chains.values():
            yield from chain.rules


class ServiceChainReader:
    """Reads the chains of Services that the kernel has accepted, with all chains and sets that their rules refer to."""

    def __init__(self, family: Family, snapshot: TableSnapshot, read_rules: ReadRules) -> None:
        """`read_rules` must return the rules that the table had when the snapshot was taken."""
        self.family = family
        self._snapshot = snapshot
        self._read_rules = read_rules
        self._rules: dict[str, tuple[NftRule, ...] | None] = {}

    def read(self, name: str, service_port: str) -> ServiceChains | None:
        """Read a chain of a Service. Return None if kproxy would not have written it for this Service.

        Then another program may have changed the chain.
        """
        found = ServiceChains()
        return found if self._collect(name, service_port, found) else None

    def _collect(self, name: str, service_port: str, found: ServiceChains) -> bool:
        if name in found.chains:
            return True
        kind = names.kind_of_service_chain(name, service_port.partition(":")[0])
        if not kind or self._snapshot.chains.get(name, True) is not None:
            return False
        rules = self._decoded(name)
        # A firewall chain must not admit sources that the Service does not admit.
        if not rules or (kind == _FIREWALL and rules[-1].statements != (Drop(),)):
            return False
        statements = (statement for rule in rules for statement in rule.statements)
        if not all(self._collect_target(statement, service_port, found) for statement in statements):
            return False
        found.chains[name] = NftChain(name, rules, comment_of(service_port + _COMMENTS.get(kind, "")))
        return True

    def _collect_target(self, statement: Statement, service_port: str, found: ServiceChains) -> bool:
        """Add the chain or set that a statement refers to, if any. Return False if it cannot stay."""
        if isinstance(statement, (Goto, Jump)):
            return self._collect(statement.chain, service_port, found)
        if isinstance(statement, (Lookup, UpdateSet)):
            return self._collect_set(statement.set, found)
        return True

    def _decoded(self, name: str) -> tuple[NftRule, ...] | None:
        """Return the rules of a chain, or None if it has rules that no chain of a Service has."""
        if name not in self._rules:
            rules = [decode_rule(each, self.family) for each in self._read_rules(name)]
            known = tuple(each for each in rules if each is not None)
            self._rules[name] = known if len(known) == len(rules) else None
        return self._rules[name]

    def _collect_set(self, name: str, found: ServiceChains) -> bool:
        layout = self._snapshot.sets.get(name)
        if layout is None or not layout.timeout:
            return False
        definition = NftSet(name, (KeyField.SOURCE,), timeout=layout.timeout // 1000)
        found.sets[name] = definition
        return set_layout(definition, self.family) == layout
