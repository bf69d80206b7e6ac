"""Read a large table by the fingerprints of its chains, without `iptables-save`.

`iptables-save` of iptables-nft sorts the chains. If their order in the kernel is that of the output, as after
`iptables-restore` has restored such an output, this takes 9 s for 30,000 chains (iptables 1.8.9). Dumping all of them
over netlink takes 0.9 s in any order, and 0.25 s if they have no rules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Protocol

from kproxy.iptables.base_rules import ensured_rules
from kproxy.iptables.chain_groups import Group, chains_of, dispatch_chains, fingerprint, recorded_chains, shared_chains
from kproxy.iptables.ledger import IptablesLedger, IptablesSnapshot
from kproxy.iptables.names import ChainName, is_own
from kproxy.iptables.repair import make_snapshot
from kproxy.model.context import Context

MAX_LISTED_CHAINS = 100
"""Maximum number of per-Service chains and shards whose rules are read one by one. Each takes 5 ms."""
_UNKNOWN = -1
"""The digest of a chain that exists and whose rules are unknown, or are known only to differ from the ledger.

Python's `hash` never returns it.
"""
_NO_RULES = hash("")
_TARGET = re.compile(r" -[jg] (\S+)")


class ContentReader(Protocol):
    """The part of `kproxy.iptables.backend.IptablesKernel` that reads the content of tables."""

    def fingerprints(self, groups: Iterable[Sequence[ChainName]]) -> list[int] | None:
        """Return a number for each group of chains, which identifies the rules of these chains. 0 means no rules."""

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        """Return the rules of those `chains` that exist."""


def read_table(
    kernel: ContentReader,
    table: str,
    existing: Collection[ChainName],
    ledger: IptablesLedger,
    context: Context,
    *,
    recorded: Mapping[Group, int],
) -> IptablesSnapshot | None:
    """Return a snapshot of a table. Of the chains of other tools, it contains those to which kproxy's neighbors jump.

    `existing` are the chains of the table. `recorded` are fingerprints of groups of chains, taken when the chains
    equaled the ledger. A group with another fingerprint is read chain by chain. If that would take too long, its
    digests in the snapshot are only known to differ from those in the ledger.

    Return None if the content of too many chains is unknown. Raises `OSError` or `CommandError`.
    """
    snapshot = IptablesSnapshot({chain: _UNKNOWN for chain in existing if chain.name.startswith("KUBE-")}, {})
    suspects = _compare(kernel, table, ledger, recorded, snapshot)
    differing = _with_rules(kernel, (chain for group in suspects for chain in chains_of(group, ledger)), snapshot)
    if len(differing) > MAX_LISTED_CHAINS:
        differing -= {chain for group in suspects if group in recorded for chain in chains_of(group, ledger)}
        if len(differing) > MAX_LISTED_CHAINS:
            return None
    shared = {chain for chain in shared_chains(ledger, context) if chain.table == table}
    for chain, rules in _list(kernel, differing | shared, existing).items():
        found = make_snapshot({chain: rules})
        snapshot.digests |= found.digests
        snapshot.rules |= found.rules
    builtin = {rule.chain for rule in ensured_rules(context) if not rule.chain.name.startswith("KUBE-")}
    snapshot.rules |= {chain: [] for chain in (builtin & shared).difference(existing)}
    return snapshot


def _compare(
    kernel: ContentReader,
    table: str,
    ledger: IptablesLedger,
    recorded: Mapping[Group, int],
    snapshot: IptablesSnapshot,
) -> list[Group]:
    """Add the digests of all groups that are intact or have no rules to the snapshot. Return the others."""
    groups: dict[Group, list[ChainName]] = {chain: [chain] for chain in dispatch_chains(ledger) if chain.table == table}
    if table == "nat":
        groups |= {key: chains for key in ledger.services if (chains := chains_of(key, ledger))}
    suspects = []
    for group, number in zip(groups, kernel.fingerprints(groups.values()) or (), strict=True):
        digests: Iterable[tuple[ChainName, int]] = ()
        if not number:
            digests = ((chain, _NO_RULES) for chain in groups[group])
        elif recorded.get(group) == fingerprint(number, group, ledger) and group not in ledger.deviating:
            digests = recorded_chains(group, ledger)
        else:
            suspects.append(group)
        snapshot.digests.update((chain, digest) for chain, digest in digests if chain in snapshot.digests)
    return suspects


def _with_rules(kernel: ContentReader, chains: Iterable[ChainName], snapshot: IptablesSnapshot) -> set[ChainName]:
    """Return those of the existing chains that have rules. Add the others to the snapshot."""
    existing = [chain for chain in chains if chain in snapshot.digests]
    numbers = kernel.fingerprints([[chain] for chain in existing]) or ()
    found = {chain for chain, number in zip(existing, numbers, strict=True) if number}
    snapshot.digests.update((chain, _NO_RULES) for chain in existing if chain not in found)
    return found


def _list(
    kernel: ContentReader, chains: Iterable[ChainName], existing: Container[ChainName]
) -> dict[ChainName, list[str]]:
    """Return the rules of the chains that exist, and of the chains of other tools that they reach by jumps."""
    listed: dict[ChainName, list[str]] = {}
    wanted = {chain for chain in chains if chain in existing}
    while wanted:
        found = kernel.list_rules(wanted)
        listed |= found
        targets = {
            ChainName(chain.table, target)
            for chain, rules in found.items()
            for rule in rules
            for target in _TARGET.findall(rule)
        }
        wanted = {chain for chain in targets if chain in existing and chain not in listed and not is_own(chain)}
    return listed
