"""Taking all rules of a proxy in iptables mode out again, ours or kube-proxy's. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import islice

from kproxy.iptables.names import (
    CANARIES,
    DISPATCH,
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
        ChainName("nat", "KUBE-FIREWALL"),  # until Kubernetes 1.26; that of table filter is the kubelet's
        ChainName("filter", "KUBE-NODE-PORT"),
        ChainName("filter", "KUBE-SOURCE-RANGES-FIREWALL"),
        ChainName("filter", "KUBE-IPVS-FILTER"),
        ChainName("filter", "KUBE-IPVS-OUT-FILTER"),
    }
)
"""The chains that only kube-proxy's ipvs mode has. Others it shares with iptables mode, under the same names."""
_FIXED = frozenset({*DISPATCH, *CANARIES, FILTER_FORWARD, MARK_MASQ, POSTROUTING, *IPVS_CHAINS})


def cleanup(saved: Mapping[ChainName, SavedChain], *, block_rules: int) -> Iterator[RestoreInput]:
    """Yield the changes that remove our chains and the rules that jump to them from what a dump shows.

    The first takes away what leads to the Services' own chains; those follow, about `block_rules` at a time.
    KUBE-FIREWALL and what leads to it stays: it protects 127.0.0.1, and the kubelet may rely on it.
    """
    fixed = [chain for chain in saved if chain in _FIXED]
    own = sorted((chain for chain in saved if chain.name.startswith(PORT_CHAIN_PREFIXES)), key=deletion_order)
    gone = frozenset((*fixed, *own))
    edits = _jumps(saved, gone)
    # KUBE-MARK-MASQ is what the Services' chains jump to, so it goes last.
    if edits or fixed:
        yield RestoreInput(edits=edits, deleted=[chain for chain in fixed if chain != MARK_MASQ])
    rest = iter(own)
    while batch := list(islice(rest, block_rules)):
        yield RestoreInput(deleted=batch)
    if MARK_MASQ in gone:
        yield RestoreInput(deleted=[MARK_MASQ])


def cleanup_ipvs(saved: Mapping[ChainName, SavedChain]) -> RestoreInput:
    """Return the change that removes what only ipvs mode has from what a dump shows, and all jumps there."""
    gone = [chain for chain in saved if chain in IPVS_CHAINS]
    return RestoreInput(edits=_jumps(saved, frozenset(gone)), deleted=gone)


def _jumps(saved: Mapping[ChainName, SavedChain], gone: frozenset[ChainName]) -> list[tuple[str, str]]:
    """Return the commands that delete the rules by which chains that stay lead to those that go."""
    return [
        (chain.table, "-D" + rule.removeprefix("-A"))
        for chain, content in saved.items()
        if chain not in gone
        for rule in content.rules
        if ChainName(chain.table, _target(rule)) in gone
    ]


def _target(rule: str) -> str:
    words = iter(shlex.split(rule))
    for word in words:
        if word == "--comment":
            next(words, "")
        elif word in {"-j", "-g"}:
            return next(words, "")
    return ""
