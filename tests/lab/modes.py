"""The two modes of kproxy: how it is told which, and what each has put into the kernel."""

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


def flag(mode: str) -> str:
    """Return the flag that puts kproxy into a mode; it counts even behind another of the same name."""
    return f"--proxy-mode={mode}"


class Rules(Protocol):
    """What a mode keeps in a node's kernel, of both families."""

    def text(self) -> str:
        """Return all of it, without what changes by itself."""

    def destinations(self) -> set[str]:
        """Return each `ip:port` that connections are sent to."""


def rules_of(mode: str, node: Namespace) -> Rules:
    """Return the way to look at a mode's rules on a node."""
    return NftablesRules(node) if mode == "nftables" else IptablesRules(node)


class IptablesRules:
    """All tables of iptables."""

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
    """The two tables of nftables mode, as `nft` shows them."""

    def __init__(self, node: Namespace) -> None:
        self._node = node

    def text(self) -> str:
        """Return the tables in one form for every order in which the kernel may list elements, chains and sets."""
        return json.dumps({family: table_state(self._node, family) for family in NFT_FAMILIES}, indent=1)

    def destinations(self) -> set[str]:
        """Return each `ip:port` that is an element of a map of endpoints, or that a rule names."""
        found: set[str] = set()
        for family in NFT_FAMILIES:
            listed = self._node.run(["nft", "list", "table", family, TABLE], check=False).stdout
            found |= {_socket(*each) for each in _ENDPOINT.findall(listed)}
            found |= {match[1] for line in listed.splitlines() if (match := _TRANSLATION.search(line))}
        return found

    def elements(self) -> set[tuple[str, str, str]]:
        """Return every element but those that packets made: the family, the set, and the element as text."""
        return {
            (family, content["name"], element)
            for family in NFT_FAMILIES
            for content in table_state(self._node, family).values()
            for element in content.get("elem", ())
        }


def table_state(node: Namespace, family: str) -> dict[str, Any]:
    """Return what a table holds, from `nft -j`: sets and chains by name, elements in order, no handles.

    Elements of sets that packets fill are left out. So are comments of sets and chains: they cannot be changed when a
    table is taken over. Empty if there is no such table.
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


def nothing_left_of_other(node: Namespace, mode: str) -> bool:
    """Return whether a node holds nothing of the mode that is not this one, but for the chain that kubelet has too."""
    if mode == "iptables":
        return " kube-proxy\n" not in node.run(["nft", "list", "tables"]).stdout
    lines = [line for line in IptablesRules(node).text().splitlines() if "KUBE-" in line]
    return all("KUBE-FIREWALL" in line for line in lines)


def remembered(node: Namespace, family: str) -> dict[str, dict[str, int]]:
    """Return who is remembered by session affinity: the sets, with the clients in each and the seconds they have."""
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
