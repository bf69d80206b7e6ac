"""The recorded clusters: their objects, their configuration, and the rules kube-proxy made of them."""

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
LAST = "this must be the last rule in this chain"

State = dict[ChainName, list[str]]


def items(scenario: str, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / scenario / f"{kind}.json").read_text())["items"]
    return found


def replaces(scenario: str) -> list[Replace]:
    return [
        Replace(kind, tuple(o for item in items(scenario, name) if (o := decode_object(kind, item).object)))
        for name, kind in KINDS.items()
    ]


def store(scenario: str) -> Store:
    found = Store("node-1")
    for delta in replaces(scenario):
        found.apply(delta)
    return found


def config(scenario: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / scenario / "config.json").read_text())
    return found


def recorded(scenario: str, family: Family) -> State:
    name = "ip6tables-save.txt" if family is Family.IPV6 else "iptables-save.txt"
    return comparable((GOLDEN / scenario / name).read_text().splitlines())


def comparable(saved: Iterable[str]) -> State:
    """The state that counts, of tables nat and filter: rules in dispatch chains have no order, but the last one."""
    chains = parse_save(saved, ("nat", "filter")).chains
    return {
        chain: sorted(content.rules, key=lambda rule: (LAST in rule, rule))
        if chain in DISPATCH_CHAINS
        else content.rules
        for chain, content in chains.items()
    }
