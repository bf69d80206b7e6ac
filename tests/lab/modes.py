"""The two proxy modes of kproxy, and the rules of each in the kernel."""

from __future__ import annotations

import json
import re
from typing import Any, Protocol

import pytest

from tests.lab.namespace import Namespace

BOTH_MODES = pytest.mark.parametrize("mode", ["iptables", "nftables"])
NFT_FAMILIES = ("ip", "ip6")
TABLE = "kube-proxy"

_ENDPOINT = re.compile(r" : (\S+) \. (\d+)")
_TRANSLATION = re.compile(r" dnat to (\S+)$")


def mode_flag(mode: str) -> str:
    """Return the flag that selects a proxy mode. It overrides earlier flags of the same name."""
    return f"--proxy-mode={mode}"


class Rules(Protocol):
    """The rules of one proxy mode on a node, of both families."""

    def text(self) -> str:
        """Return all rules as text, without counters and the like."""

    def destinations(self) -> set[str]:
        """Return each `ip:port` that the rules DNAT to."""


def rules_of(mode: str, node: Namespace) -> Rules:
    """Return a reader of a mode's rules on a node."""
    return NftablesRules(node) if mode == "nftables" else IptablesRules(node)


class IptablesRules:
    """The rules in all tables of iptables."""

    def __init__(self, node: Namespace) -> None:
        self._node = node

    def text(self) -> str:
        """Return the rules of both families without counters and dates."""
        saved = "".join(self._node.run([f"{program}-save"]).stdout for program in ("iptables", "ip6tables"))
        lines = (line.partition(" [")[0] if line.startswith(":") else line for line in saved.splitlines())
        return "\n".join(line for line in lines if not line.startswith("#"))

    def destinations(self) -> set[str]:
        """Return each `ip:port` that a rule names."""
        lines = (line for line in self.text().splitlines() if " --to-destination " in line)
        return {line.rpartition(" ")[2] for line in lines}


class NftablesRules:
    """The two tables of nftables mode, as `nft` lists them."""

    def __init__(self, node: Namespace) -> None:
        self._node = node

    def text(self) -> str:
        """Return the tables in canonical order: the kernel may list elements, chains and sets in any order."""
        return json.dumps({family: table_state(self._node, family) for family in NFT_FAMILIES}, indent=1)

    def destinations(self) -> set[str]:
        """Return each `ip:port` in a map of endpoints or in a rule."""
        found: set[str] = set()
        for family in NFT_FAMILIES:
            listed = self._node.run(["nft", "list", "table", family, TABLE], check=False).stdout
            found |= {_socket(*each) for each in _ENDPOINT.findall(listed)}
            found |= {match[1] for line in listed.splitlines() if (match := _TRANSLATION.search(line))}
        return found

    def elements(self) -> set[tuple[str, str, str]]:
        """Return (family, set, element as text) of every element that was not added by a packet."""
        return {
            (family, content["name"], element)
            for family in NFT_FAMILIES
            for content in table_state(self._node, family).values()
            for element in content.get("elem", ())
        }


def table_state(node: Namespace, family: str) -> dict[str, Any]:
    """Return a table from `nft -j`: sets and chains by name, elements sorted, without handles; empty without a table.

    Elements of dynamic sets are omitted. So are comments of sets and chains, which cannot be changed when kproxy takes
    over a table.
    """
    done = node.run(["nft", "-j", "list", "table", family, TABLE], check=False)
    state: dict[str, Any] = {}
    for item in json.loads(done.stdout)["nftables"] if done.returncode == 0 else ():
        ((kind, content),) = item.items()
        if kind != "rule":
            content.pop("comment", None)
        if kind in {"set", "map"}:
            elements = [] if "timeout" in content else content.get("elem", [])
            content["elem"] = sorted(json.dumps(each, sort_keys=True) for each in elements)
            state[f"{kind} {content['name']}"] = _without_handle(content)
        elif kind == "chain":
            state[f"chain {content['name']}"] = {**_without_handle(content), "rules": []}
        elif kind == "rule":
            state[f"chain {content['chain']}"]["rules"].append(_without_handle(content))
    return dict(sorted(state.items()))


def no_rules_of_other_mode(node: Namespace, mode: str) -> bool:
    """Return whether no rules of the other mode exist, except for the chain KUBE-FIREWALL, which kubelet uses too."""
    if mode == "iptables":
        return " kube-proxy\n" not in node.run(["nft", "list", "tables"]).stdout
    lines = [line for line in IptablesRules(node).text().splitlines() if "KUBE-" in line]
    return all("KUBE-FIREWALL" in line for line in lines)


def affinity_clients(node: Namespace, family: str) -> dict[str, dict[str, int]]:
    """Return the clients in each session affinity set, with the seconds until they expire."""
    listed = json.loads(node.run(["nft", "-j", "list", "table", family, TABLE]).stdout)["nftables"]
    sets = (item["set"] for item in listed if "set" in item)
    return {
        each["name"]: {member["elem"]["val"]: member["elem"]["expires"] for member in each.get("elem", ())}
        for each in sets
        if "timeout" in each
    }


def _without_handle(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "handle"}


def _socket(address: str, port: str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
