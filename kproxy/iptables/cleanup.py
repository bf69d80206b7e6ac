"""Taking all rules of a proxy in iptables mode out again, ours or kube-proxy's. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise

from kproxy.iptables.names import CANARIES, DISPATCH, FILTER_FORWARD, MARK_MASQ, PORT_CHAIN_PREFIXES, POSTROUTING, Chain
from kproxy.iptables.text import Restore, SavedChain

_FIXED = frozenset({*DISPATCH, *CANARIES, FILTER_FORWARD, MARK_MASQ, POSTROUTING})


def cleanup(saved: Mapping[Chain, SavedChain]) -> Restore:
    """Return the change that removes our chains and the rules that jump to them from what a dump shows.

    KUBE-FIREWALL and what leads to it stays: it protects 127.0.0.1, and the kubelet may rely on it.
    """
    ours = [chain for chain in saved if chain in _FIXED or chain.name.startswith(PORT_CHAIN_PREFIXES)]
    gone = frozenset(ours)
    change = Restore(deleted=ours)
    for chain, content in saved.items():
        if chain in gone:
            continue
        for rule in content.rules:
            if Chain(chain.table, _target(rule)) in gone:
                change.edits.append((chain.table, "-D" + rule.removeprefix("-A")))
    return change


def _target(rule: str) -> str:
    words = shlex.split(rule)
    return next((target for option, target in pairwise(words) if option in {"-j", "-g"}), "")
