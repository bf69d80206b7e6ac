"""Remove the iptables rules of kproxy and of kube-proxy's iptables and ipvs modes. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import islice

from kproxy.iptables.names import (
    CANARIES,
    DISPATCH_CHAINS,
    FILTER_FORWARD,
    MARK_MASQ,
    PORT_CHAIN_PREFIXES,
    POSTROUTING,
    ChainName,
    deletion_order,
)
from kproxy.iptables.save_restore import RestoreInput, SavedChain

IPVS_CHAINS = frozenset(
    {
        ChainName("nat", "KUBE-NODE-PORT"),
        ChainName("nat", "KUBE-LOAD-BALANCER"),
        ChainName("nat", "KUBE-FIREWALL"),  # until Kubernetes 1.26; KUBE-FIREWALL in table filter is the kubelet's
        ChainName("filter", "KUBE-NODE-PORT"),
        ChainName("filter", "KUBE-SOURCE-RANGES-FIREWALL"),
        ChainName("filter", "KUBE-IPVS-FILTER"),
        ChainName("filter", "KUBE-IPVS-OUT-FILTER"),
    }
)
"""The chains that only kube-proxy's ipvs mode uses. The other chains of ipvs mode have the same names as chains of
iptables mode.
"""
_SHARED_CHAINS = frozenset({*DISPATCH_CHAINS, *CANARIES, FILTER_FORWARD, MARK_MASQ, POSTROUTING, *IPVS_CHAINS})


def cleanup(saved: Mapping[ChainName, SavedChain], *, max_transaction_rules: int) -> Iterator[RestoreInput]:
    """Yield the changes that delete all chains of kproxy and kube-proxy, and all rules that jump to these chains.

    `saved` contains the existing chains and rules. The first change deletes all shared chains except KUBE-MARK-MASQ. It
    also deletes every jump to a chain of kproxy or kube-proxy from any other chain. The following changes delete the
    per-Service chains and shards, at most `max_transaction_rules` at a time. The last change deletes KUBE-MARK-MASQ.
    KUBE-FIREWALL in table filter and the jumps to it remain, because this chain protects 127.0.0.1 and the kubelet may
    rely on it.
    """
    shared_chains = [chain for chain in saved if chain in _SHARED_CHAINS]
    port_chains = sorted((chain for chain in saved if chain.name.startswith(PORT_CHAIN_PREFIXES)), key=deletion_order)
    deleted = frozenset((*shared_chains, *port_chains))
    edits = _jump_deletions(saved, deleted)
    # KUBE-MARK-MASQ is deleted last, because per-Service chains jump to it.
    if edits or shared_chains:
        yield RestoreInput(edits=edits, deleted=[chain for chain in shared_chains if chain != MARK_MASQ])
    remaining = iter(port_chains)
    while batch := list(islice(remaining, max_transaction_rules)):
        yield RestoreInput(deleted=batch)
    if MARK_MASQ in deleted:
        yield RestoreInput(deleted=[MARK_MASQ])


def cleanup_ipvs(saved: Mapping[ChainName, SavedChain]) -> RestoreInput:
    """Return the change that deletes the `IPVS_CHAINS` that exist in a dump, and the rules that jump to them."""
    deleted = [chain for chain in saved if chain in IPVS_CHAINS]
    return RestoreInput(edits=_jump_deletions(saved, frozenset(deleted)), deleted=deleted)


def _jump_deletions(saved: Mapping[ChainName, SavedChain], deleted: frozenset[ChainName]) -> list[tuple[str, str]]:
    """Return the commands that delete every rule in a remaining chain that jumps to a deleted chain."""
    return [
        (chain.table, "-D" + rule.removeprefix("-A"))
        for chain, content in saved.items()
        if chain not in deleted
        for rule in content.rules
        if ChainName(chain.table, _target(rule)) in deleted
    ]


def _target(rule: str) -> str:
    arguments = iter(shlex.split(rule))
    for argument in arguments:
        if argument == "--comment":
            next(arguments, "")
        elif argument in {"-j", "-g"}:
            return next(arguments, "")
    return ""
