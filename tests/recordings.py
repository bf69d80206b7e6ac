"""The recorded clusters: objects, kube-proxy configuration, and the rules that kube-proxy programmed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kproxy.iptables.names import DISPATCH_CHAINS, ChainName
from kproxy.iptables.save_restore import parse_save
from kproxy.kube.codec.json_codec import decode_object
from kproxy.model.delta import Kind, Replace
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Family, Node, Service

GOLDEN = Path(__file__).parent / "golden"
SCENARIOS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
KINDS: dict[str, Kind] = {"services": Service, "endpointslices": EndpointSlice, "nodes": Node}
NODEPORTS_COMMENT = "this must be the last rule in this chain"
"""Comment of the rule that jumps to KUBE-NODEPORTS."""

State = dict[ChainName, list[str]]


def items(scenario: str, kind: str) -> list[dict[str, Any]]:
    """Return the recorded objects of a kind, one of the keys of `KINDS`, as plain JSON."""
    objects: list[dict[str, Any]] = json.loads((GOLDEN / scenario / f"{kind}.json").read_text())["items"]
    return objects


def replaces(scenario: str) -> list[Replace]:
    """Return one delta per kind with all recorded objects."""
    return [
        Replace(kind, tuple(o for item in items(scenario, name) if (o := decode_object(kind, item).object)))
        for name, kind in KINDS.items()
    ]


def store(scenario: str) -> Store:
    """Return a store with all recorded objects."""
    filled = Store("node-1")
    for delta in replaces(scenario):
        filled.apply(delta)
    return filled


def config(scenario: str) -> dict[str, Any]:
    """Return the kube-proxy configuration as plain JSON."""
    configuration: dict[str, Any] = json.loads((GOLDEN / scenario / "config.json").read_text())
    return configuration


def recorded(scenario: str, family: Family) -> State:
    """Return the comparable state of the rules that kube-proxy programmed in iptables mode."""
    name = "ip6tables-save.txt" if family is Family.IPV6 else "iptables-save.txt"
    return comparable((GOLDEN / scenario / name).read_text().splitlines())


def comparable(saved: Iterable[str]) -> State:
    """Parse the output of iptables-save into a comparable form: chains of the tables nat and filter.

    Rules in dispatch chains are sorted, because their order has no meaning. The jump to KUBE-NODEPORTS stays last.
    """
    chains = parse_save(saved, ("nat", "filter")).chains
    return {
        chain: sorted(content.rules, key=lambda rule: (NODEPORTS_COMMENT in rule, rule))
        if chain in DISPATCH_CHAINS
        else content.rules
        for chain, content in chains.items()
    }
