"""The layout of dispatch chains that are split by destination: every packet reaches its rules and few others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.iptables.dispatch import MAX_LEVELS, lay_out
from kproxy.iptables.names import (
    DISPATCH_CHAINS,
    FILTER_EXTERNAL_SERVICES,
    NAT_NODEPORTS,
    NAT_SERVICES,
    SHARD_PREFIXES,
    ChainName,
    deletion_order,
    is_shard,
)
from kproxy.iptables.render import DispatchRule
from kproxy.model.types import Family

TAIL = ("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",)
MIXED = FILTER_EXTERNAL_SERVICES
"""A dispatch chain with both rules that match addresses and rules that match NodePorts."""

BITS = {Family.IPV4: 32, Family.IPV6: 128}


def address_text(number: int, family: Family) -> str:
    return str(IPv4Address(number) if family is Family.IPV4 else IPv6Address(number))


def to_address(
    number: int, name: str = "x", *, owner: ChainName = NAT_SERVICES, family: Family = Family.IPV4
) -> DispatchRule:
    match = f'-d {address_text(number, family)}/{BITS[family]} -p tcp -m comment --comment "{name}" -m tcp --dport 80'
    return DispatchRule(owner, f"-A {owner.name} {match} -j KUBE-SVC-{name}", number)


def to_port(number: int, protocol: str = "tcp", name: str = "x", *, owner: ChainName = NAT_NODEPORTS) -> DispatchRule:
    match = f'-p {protocol} -m comment --comment "{name}" -m {protocol} --dport {number}'
    return DispatchRule(owner, f"-A {owner.name} {match} -j KUBE-EXT-{name}", number, protocol)


def v4(text: str) -> int:
    return int(IPv4Address(text))


def v6(text: str) -> int:
    return int(IPv6Address(text))


def specs(rules: Iterable[DispatchRule]) -> list[str]:
    return [spec(rule.rule) for rule in rules]


def spec(rule: str) -> str:
    """Return a rule without its `-A CHAIN `."""
    return rule.split(" ", 2)[2]


class Traversal:
    """The traversal of dispatch chains by one packet.

    `evaluated` is the number of rules evaluated, `levels` the nesting depth, and `hit` the matching rules that jump to
    per-Service chains. The packet returns from every chain, so this is the worst case.
    """

    def __init__(self, chains: Mapping[ChainName, str], start: ChainName, destination: int, protocol: str = "") -> None:
        self._chains = {chain: text.splitlines() for chain, text in chains.items()}
        self._table, self._destination, self._protocol = start.table, destination, protocol
        self.evaluated = 0
        self.levels = 0
        self.hit: list[str] = []
        self._enter(start, 0)

    def _enter(self, chain: ChainName, level: int) -> None:
        self.levels = max(self.levels, level)
        for rule in self._chains[chain]:
            self.evaluated += 1
            target = ChainName(self._table, rule.rpartition(" -j ")[2])
            if not self._matches(rule.split()):
                continue
            if target in self._chains:
                self._enter(target, level + 1)
            else:
                self.hit.append(spec(rule))

    def _matches(self, words: Sequence[str]) -> bool:
        if "-d" in words:
            network = ip_network(words[words.index("-d") + 1])
            masked = self._destination & int(network.netmask)
            return not self._protocol and masked == int(network.network_address)
        if "--dport" not in words or words[words.index("-p") + 1] != self._protocol:
            return False
        low, _, high = words[words.index("--dport") + 1].partition(":")
        return int(low) <= self._destination <= int(high or low)


# The layout.


def test_chain_up_to_the_threshold_is_flat_in_the_order_of_services() -> None:
    rules = [to_address(v4(f"10.96.0.{n}")) for n in (3, 1, 2)]
    flat = "\n".join([*(rule.rule for rule in rules), *TAIL])
    for threshold in (3, 1000, 0):
        layout = lay_out(NAT_SERVICES, rules, TAIL, Family.IPV4, threshold)
        assert (layout.chains, layout.non_service_rules) == ({NAT_SERVICES: flat}, 1)
    assert len(lay_out(NAT_SERVICES, rules, TAIL, Family.IPV4, 2).chains) > 1


def test_chain_above_the_threshold_is_a_tree_of_prefixes() -> None:
    addresses = ("203.0.113.7", "10.96.0.1", "10.96.0.2", "10.96.0.10", "10.96.128.0", "10.96.128.1")
    rules = [to_address(v4(address), str(n)) for n, address in enumerate(addresses)]
    layout = lay_out(NAT_SERVICES, rules, TAIL, Family.IPV4, 3)
    rule = specs(rules)
    assert {chain.name: text.splitlines() for chain, text in layout.chains.items()} == {
        "KUBE-SVC-10.96.0.0/28": [f"-A KUBE-SVC-10.96.0.0/28 {rule[n]}" for n in (1, 2, 3)],
        "KUBE-SVC-10.96.128.0/31": [f"-A KUBE-SVC-10.96.128.0/31 {rule[n]}" for n in (4, 5)],
        "KUBE-SVC-10.96.0.0/16": [
            "-A KUBE-SVC-10.96.0.0/16 -d 10.96.0.0/28 -j KUBE-SVC-10.96.0.0/28",
            "-A KUBE-SVC-10.96.0.0/16 -d 10.96.128.0/31 -j KUBE-SVC-10.96.128.0/31",
        ],
        "KUBE-SVC-203.0.113.7/32": [f"-A KUBE-SVC-203.0.113.7/32 {rule[0]}"],
        "KUBE-SERVICES": [
            "-A KUBE-SERVICES -d 10.96.0.0/16 -j KUBE-SVC-10.96.0.0/16",
            "-A KUBE-SERVICES -d 203.0.113.7/32 -j KUBE-SVC-203.0.113.7/32",
            *TAIL,
        ],
    }
    assert layout.non_service_rules == 5
    assert {chain.table for chain in layout.chains} == {"nat"}


def test_ipv6_prefix_is_hashed_in_the_chain_name_and_complete_in_the_rule() -> None:
    rules = [to_address(v6(f"fd00:10:96::{n:x}"), family=Family.IPV6) for n in (0, 1, 8)]
    layout = lay_out(NAT_SERVICES, rules, (), Family.IPV6, 2)
    jumps = [
        line for text in layout.chains.values() for line in text.splitlines() if "/128" not in line.split(" -j")[0]
    ]
    assert [spec(line).split(" -j ")[0] for line in jumps] == ["-d fd00:10:96::/127", "-d fd00:10:96::/124"]
    assert all(is_shard(chain) for chain in layout.chains if chain != NAT_SERVICES)
    assert len({chain.name for chain in layout.chains}) == 4


def test_node_ports_are_split_by_protocol_and_port_range() -> None:
    rules = [to_port(n) for n in (30000, 30001, 30015, 30016)] + [to_port(53, "udp")]
    layout = lay_out(NAT_NODEPORTS, rules, (), Family.IPV4, 3)
    chains = {chain.name: [spec(line) for line in text.splitlines()] for chain, text in layout.chains.items()}
    assert chains["KUBE-NODEPORTS"] == [
        "-p tcp -m tcp --dport 29952:30207 -j KUBE-EXT-tcp-29952-30207",
        "-p udp -m udp --dport 53 -j KUBE-EXT-udp-53-53",
    ]
    assert chains["KUBE-EXT-tcp-29952-30207"] == [
        "-p tcp -m tcp --dport 30000:30015 -j KUBE-EXT-tcp-30000-30015",
        "-p tcp -m tcp --dport 30016 -j KUBE-EXT-tcp-30016-30016",
    ]
    assert chains["KUBE-EXT-tcp-30000-30015"] == specs(rules[:3])


def test_rules_of_one_destination_stay_in_one_shard() -> None:
    rules = [to_address(v4("10.96.0.1"), f"s{n}") for n in range(50)]
    layout = lay_out(NAT_SERVICES, rules, TAIL, Family.IPV4, 10)
    shard = layout.chains[ChainName("nat", "KUBE-SVC-10.96.0.1/32")]
    assert [spec(line) for line in shard.splitlines()] == specs(rules)


def test_no_shard_matches_every_address_or_every_port() -> None:
    """iptables-save omits a match of all addresses or all ports, so the rule would never compare as equal."""
    addresses = [to_address(v4(text), owner=MIXED) for text in ("10.0.0.1", "192.0.2.1")]
    ports = [to_port(number, owner=MIXED) for number in range(1, 60)]
    few_addresses = lay_out(MIXED, addresses + ports, (), Family.IPV4, 40)
    few_ports = lay_out(MIXED, [to_port(1, owner=MIXED), to_port(65535, owner=MIXED)] * 2, (), Family.IPV4, 3)
    for layout in (few_addresses, few_ports):
        lines = [line for text in layout.chains.values() for line in text.splitlines()]
        assert not [line for line in lines if "/0 " in line or "--dport 0:65535" in line]
        assert len(layout.chains) > 2


def test_kube_proxy_removes_shards_but_never_uses_their_names() -> None:
    assert set(SHARD_PREFIXES) == set(DISPATCH_CHAINS)
    removed_by_kube_proxy = {"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-"}
    assert set(SHARD_PREFIXES.values()) <= removed_by_kube_proxy
    for table in ("nat", "filter"):
        stems = [stem for chain, stem in SHARD_PREFIXES.items() if chain.table == table]
        assert len(set(stems)) == len(stems)
    for name in ("KUBE-SVC-XRY76EGRC3BSCIIJ", "KUBE-SEP-10.0.0.0/8", "KUBE-SERVICES", "KUBE-FW-", "KUBE-SVC-10.0.0.0"):
        assert not is_shard(ChainName("nat", name))
    assert not is_shard(ChainName("mangle", "KUBE-SVC-10.0.0.0/8"))


# Properties.


@st.composite
def dispatch_rules(draw: st.DrawFn, family: Family) -> list[DispatchRule]:
    """Rules for addresses and ports that are close to each other, far apart, or equal."""
    bits = BITS[family]
    base = draw(st.sampled_from((0, (1 << bits) - 1, 0x0A600000 << bits - 32)))
    offset = st.builds(lambda low, free: low % (1 << free), st.integers(0, (1 << bits) - 1), st.integers(0, bits))
    addresses = draw(st.lists(offset, max_size=25))
    ports = draw(st.lists(st.tuples(st.integers(1, 65535), st.sampled_from(("tcp", "udp", "sctp"))), max_size=15))
    rules = [to_address(base ^ item, f"a{n}", owner=MIXED, family=family) for n, item in enumerate(addresses)]
    rules += [to_port(number, protocol, f"p{n}", owner=MIXED) for n, (number, protocol) in enumerate(ports)]
    return draw(st.permutations(rules))


TWO_CLUSTERS = st.sampled_from(Family).flatmap(
    lambda family: st.tuples(st.just(family), dispatch_rules(family), dispatch_rules(family))
)
Clusters = tuple[Family, list[DispatchRule], list[DispatchRule]]


def rules_for(rules: Iterable[DispatchRule], destination: DispatchRule) -> list[str]:
    """Return the rules that match the destination of a given rule."""
    key = (destination.destination, destination.protocol)
    return specs(rule for rule in rules if (rule.destination, rule.protocol) == key)


@settings(deadline=None, max_examples=200)
@given(TWO_CLUSTERS, st.sampled_from((1, 2, 5)))
def test_every_packet_reaches_exactly_its_rules_in_order(clusters: Clusters, threshold: int) -> None:
    family, rules, others = clusters
    chains = lay_out(MIXED, rules, (), family, threshold).chains
    for rule in (*rules, *others):
        traversal = Traversal(chains, MIXED, rule.destination, rule.protocol)
        assert traversal.hit == rules_for(rules, rule)
        assert traversal.levels <= MAX_LEVELS


@settings(deadline=None, max_examples=200)
@given(TWO_CLUSTERS, st.sampled_from((1, 2, 5, 12)), st.data())
def test_every_packet_reaches_its_rules_while_one_tree_replaces_another(
    clusters: Clusters, threshold: int, data: st.DataObject
) -> None:
    family, before, more = clusters
    after = before[: data.draw(st.integers(0, len(before)))] + more
    old, new = (list(lay_out(MIXED, rules, (), family, threshold).chains.items()) for rules in (before, after))
    chains = dict(old + new[: data.draw(st.integers(0, len(new)))])
    for rule in (*before, *after):
        assert Traversal(chains, MIXED, rule.destination, rule.protocol).hit in (
            rules_for(before, rule),
            rules_for(after, rule),
        )


@settings(deadline=None, max_examples=200)
@given(TWO_CLUSTERS, st.sampled_from((1, 2, 5)))
def test_tree_is_valid_for_iptables_and_written_children_first(clusters: Clusters, threshold: int) -> None:
    family, rules, _ = clusters
    layout = lay_out(MIXED, rules, (), family, threshold)
    texts = {chain: text.splitlines() for chain, text in layout.chains.items()}
    known: set[ChainName] = set()
    for chain, lines in texts.items():
        targets = [ChainName(MIXED.table, line.rpartition(" -j ")[2]) for line in lines]
        children = [target for target in targets if target in texts]
        assert known.issuperset(children), "jumps to a chain that is written later"
        known.add(chain)
        if chain == MIXED:
            continue
        assert len(children) <= 16
        assert is_shard(chain)
        assert len(chain.name) <= 28
        assert children in ([], targets)
        assert all(deletion_order(chain) < deletion_order(target) < 0 for target in children)
    assert sum(map(len, texts.values())) == len(rules) + layout.non_service_rules
    assert list(texts)[-1] == MIXED


@given(TWO_CLUSTERS, st.sampled_from((1, 2, 5)))
def test_layout_does_not_depend_on_the_order_of_services(clusters: Clusters, threshold: int) -> None:
    family, rules, _ = clusters
    distinct = list({(rule.destination, rule.protocol): rule for rule in rules}.values())
    if len(distinct) > threshold:
        reverse = lay_out(MIXED, distinct[::-1], (), family, threshold)
        assert lay_out(MIXED, distinct, (), family, threshold).chains == reverse.chains
