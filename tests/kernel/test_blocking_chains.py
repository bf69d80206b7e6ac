"""Chains of other programs that drop all packets of Services are found in the real kernel, and others are not."""

from __future__ import annotations

import pytest

from kproxy.app.backends import make_families
from kproxy.app.own_commits import OwnCommits
from kproxy.config import Config
from kproxy.host.blocking_chains import blocking_chains
from kproxy.model.store import Store
from kproxy.model.types import Family
from tests.inprocess import EMPTY_LISTS
from tests.lab.namespace import Namespace

pytestmark = pytest.mark.usefixtures("kernel", "nft")
BASE = "type filter hook {hook} priority {priority}; policy {policy};"


def table(*rules: str, family: str = "inet", hook: str = "forward", priority: int = 0, policy: str = "accept") -> str:
    base = BASE.format(hook=hook, priority=priority, policy=policy)
    body = "".join(f"{rule}; " for rule in rules)
    return f"table {family} other {{ set bad {{ type mark; }}; chain more {{ }}; chain c {{ {base} {body}}}; }}"


BLOCKING = [
    table("drop"),
    table("counter log drop", hook="prerouting", priority=-300),
    table("reject", hook="output"),
    table("tcp dport 22 drop", "meta mark 7 counter", "meta mark @bad drop", "drop", priority=500),
    table(policy="drop"),
    table("ct state invalid drop", policy="drop"),
    table("drop", family="ip"),
]
PASSING = [
    table(),
    table("tcp dport 22 drop"),
    table("ct state established accept", "drop"),
    table("jump more", "drop"),
    table("meta mark vmap { 1 : accept }", "drop"),
    table("accept", policy="drop"),
    table("drop", hook="input"),
    table("drop", family="ip6"),
    table("drop", family="arp", hook="input"),
    "table inet other { flags dormant; chain c { type filter hook forward priority 0; drop; }; }",
    "table ip other { chain c { type nat hook prerouting priority 0; drop; }; }",
    "table inet other { chain c { drop; }; }",
]


@pytest.mark.parametrize("rules", BLOCKING)
def test_chain_that_drops_everything_is_found(namespace: Namespace, rules: str) -> None:
    namespace.run(["nft", "-f", "-"], rules)
    (found,) = namespace.call(lambda: blocking_chains(Family.IPV4))
    assert found.startswith(("chain c of table inet other (hook ", "chain c of table ip other (hook "))
    assert found.endswith(") drops all packets, also those of Services")
    other = namespace.call(lambda: blocking_chains(Family.IPV6))
    assert other == ([] if "table ip " in rules else [found])


@pytest.mark.parametrize("rules", PASSING)
def test_chain_that_lets_packets_pass_is_not_found(namespace: Namespace, rules: str) -> None:
    namespace.run(["nft", "-f", "-"], rules)
    assert namespace.call(lambda: blocking_chains(Family.IPV4)) == []


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (
            "-t raw -A PREROUTING -j DROP",
            "PREROUTING of table ip raw (hook prerouting, priority -300) drops all packets",
        ),
        ("-t mangle -A FORWARD -m comment --comment why -j DROP", "FORWARD of table ip mangle (hook forward, priority"),
        ("-t filter -I FORWARD -j REJECT", "FORWARD of table ip filter (hook forward, priority 0) drops all packets"),
        ("-t filter -P FORWARD DROP", "FORWARD of table ip filter (hook forward, priority 0) drops all packets"),
    ],
)
def test_chain_of_iptables_is_found(namespace: Namespace, command: str, found: str) -> None:
    namespace.run(["iptables-nft", *command.split()])
    (line,) = namespace.call(lambda: blocking_chains(Family.IPV4))
    assert line.startswith(f"chain {found}")


def test_policy_of_a_chain_with_rules_is_found_only_where_nobody_needs_it(namespace: Namespace) -> None:
    for chain in ("nat OUTPUT", "mangle FORWARD", "filter FORWARD", "filter OUTPUT"):
        name, base = chain.split()
        namespace.run(["iptables-nft", "-t", name, "-A", base, "-p", "tcp", "-j", "ACCEPT"])
        namespace.run(["nft", f"add chain ip {name} {base} {{ policy drop; }}"])  # iptables refuses it in table nat
    found = namespace.call(lambda: blocking_chains(Family.IPV4))
    assert sorted(line.partition(" (")[0] for line in found) == [
        "chain FORWARD of table ip mangle",
        "chain OUTPUT of table ip nat",
    ]
    assert all(
        line.endswith("policy drop: packets of Services that none of its rules accepts are dropped") for line in found
    )


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_comparison_reports_a_chain_once_and_again_after_it_was_gone(namespace: Namespace, mode: str) -> None:
    """kproxy's own chains are never reported."""
    store = Store("node-1")
    for each in EMPTY_LISTS:
        store.apply(each)

    def compared() -> list[str]:
        found: list[str] = []
        while (result := family.compare_next(store)) is not None:
            found += result.findings
        return found

    families = namespace.call(lambda: make_families(Config(mode=mode), [], OwnCommits()))  # type: ignore[arg-type]
    family = families[Family.IPV4]
    namespace.call(lambda: family.sync(store))
    assert namespace.call(compared) == []
    expected = ["chain c of table inet other (hook forward, priority 0) drops all packets, also those of Services"]
    for _ in range(2):
        namespace.run(["nft", "-f", "-"], table("drop"))
        assert namespace.call(compared) == expected
        assert namespace.call(compared) == []
        namespace.run(["nft", "add", "table", "inet", "unrelated"])
        assert namespace.call(compared) == []
        namespace.run(["nft", "delete", "table", "inet", "other"])
        assert namespace.call(compared) == []
