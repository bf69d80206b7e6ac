"""Groups of chains that are compared together, and the numbers that tell whether their rules equal the ledger. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain as concatenate
from typing import TypeAlias

from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.ledger import Digest, IptablesLedger
from kproxy.iptables.names import CANARIES, FILTER_FIREWALL, ChainName
from kproxy.model.context import Context
from kproxy.model.types import ServiceKey

Group: TypeAlias = ServiceKey | ChainName
"""A Service, which stands for its per-Service chains, or a dispatch chain or shard."""


def all_groups(ledger: IptablesLedger) -> Iterator[Group]:
    """Iterate over all groups in a ledger."""
    yield from dispatch_chains(ledger)
    yield from ledger.services


def dispatch_chains(ledger: IptablesLedger) -> Iterator[ChainName]:
    """Iterate over the dispatch chains and the shards in a ledger."""
    return concatenate.from_iterable(record.chains for record in ledger.dispatch.values())


def shared_chains(ledger: IptablesLedger, context: Context) -> set[ChainName]:
    """Return the chains that belong to no group and in which kproxy has rules, including those of other tools."""
    return {*CANARIES, FILTER_FIREWALL, *ledger.base, *(rule.chain for rule in ensured_rules(context))}


def chains_of(group: Group, ledger: IptablesLedger) -> list[ChainName]:
    """Return the chains of a group, or none if it is no longer in the ledger."""
    if isinstance(group, ChainName):
        return [group] if any(group in record.chains for record in ledger.dispatch.values()) else []
    ports = ledger.services.get(group, {}).values()
    return [ChainName("nat", name) for port in ports for name in port.names.split()]


def recorded_chains(group: Group, ledger: IptablesLedger) -> Iterator[tuple[ChainName, Digest]]:
    """Iterate over the chains of a group with their digests in the ledger."""
    if isinstance(group, ChainName):
        yield from ((group, record.chains[group]) for record in ledger.dispatch.values() if group in record.chains)
        return
    for port in ledger.services.get(group, {}).values():
        yield from ((ChainName("nat", name), digest) for name, digest in port.chains())


def count_chains(ledger: IptablesLedger) -> int:
    """Return the number of chains in all groups."""
    ports = (port for record in ledger.services.values() for port in record.values() if port.names)
    return sum(1 for _ in dispatch_chains(ledger)) + sum(port.names.count(" ") + 1 for port in ports)


def fingerprint(number: int, group: Group, ledger: IptablesLedger) -> int:
    """Return a number for a group that identifies its rules in the kernel and its rules in the ledger.

    `number` identifies its rules in the kernel. If the fingerprint equals one that was taken when both were known to be
    the same, they are the same again.
    """
    recorded: Iterable[object]
    if isinstance(group, ChainName):
        recorded = (record.chains[group] for record in ledger.dispatch.values() if group in record.chains)
    else:
        recorded = ((port.names, port.digests) for port in ledger.services.get(group, {}).values())
    return hash((number, tuple(recorded)))


def all_chains(table: str, ledger: IptablesLedger, context: Context) -> set[ChainName]:
    """Return all chains of a table in which kproxy has rules."""
    chains = concatenate.from_iterable(chains_of(group, ledger) for group in all_groups(ledger))
    return {chain for chain in concatenate(chains, shared_chains(ledger, context)) if chain.table == table}
