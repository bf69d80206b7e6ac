"""The ledger of iptables mode: the rules that the kernel accepted so far, and snapshots of existing rules."""

from __future__ import annotations

from collections import Counter

from kproxy.iptables.ledger import DispatchRecord, IptablesLedger, IptablesSnapshot, PortRecord, changed_dispatch_chains
from kproxy.iptables.names import FILTER_SERVICES, NAT_NODEPORTS, NAT_SERVICES, ChainName
from kproxy.iptables.patch import MIN_PATCHABLE_RULES
from kproxy.iptables.render import DispatchRule, RenderedPort
from kproxy.iptables.save_restore import SavedChain


def port(*dispatch: tuple[ChainName, str], **chains: str) -> PortRecord:
    named = {name.replace("_", "-"): rules for name, rules in chains.items()}
    rules = tuple(DispatchRule(chain, rule, number) for number, (chain, rule) in enumerate(dispatch))
    return PortRecord.from_rendered(RenderedPort(named, rules))


def test_port_record_has_a_digest_of_each_chain() -> None:
    record = port(KUBE_SVC_A="one\ntwo", KUBE_SEP_A="three")
    assert dict(record.chains()) == {"KUBE-SVC-A": hash("one\ntwo"), "KUBE-SEP-A": hash("three")}
    assert dict(port().chains()) == {}
    assert record == port(KUBE_SVC_A="one\ntwo", KUBE_SEP_A="three")
    assert record != port(KUBE_SVC_A="one\ntwo", KUBE_SEP_A="four")


def test_port_record_has_a_digest_of_each_rule_of_long_chains() -> None:
    first = [f"-j A{number}" for number in range(MIN_PATCHABLE_RULES)]
    second = [f"-j B{number}" for number in range(30)]
    short = first[1:]
    record = port(KUBE_SVL_A="\n".join(first), KUBE_SEP_A="\n".join(short), KUBE_SVC_A="\n".join(second))
    assert list(record.rule_digests_of("KUBE-SVL-A")) == [hash(rule) for rule in first]
    assert list(record.rule_digests_of("KUBE-SVC-A")) == [hash(rule) for rule in second]
    assert list(record.rule_digests_of("KUBE-SEP-A")) == []
    assert list(record.rule_digests_of("KUBE-SVC-B")) == []
    assert record.rule_count == len(first) + len(short) + len(second)


def test_snapshot_has_digests_of_own_chains_and_rules_of_shared_ones() -> None:
    snapshot = IptablesSnapshot.from_saved(
        {
            ChainName("nat", "KUBE-SVC-A"): SavedChain(["one", "two"]),
            ChainName("nat", "KUBE-SERVICES"): SavedChain(["three"]),
            ChainName("nat", "PREROUTING"): SavedChain(["four"]),
            ChainName("nat", "CALICO"): SavedChain([]),
        }
    )
    assert snapshot.digests == {
        ChainName("nat", "KUBE-SVC-A"): hash("one\ntwo"),
        ChainName("nat", "KUBE-SERVICES"): hash("three"),
    }
    assert snapshot.rules[ChainName("nat", "PREROUTING")] == ["four"]
    assert ChainName("nat", "KUBE-SVC-A") not in snapshot.rules


def test_unused_per_service_chains_of_table_nat_are_stale() -> None:
    names = ("KUBE-SVC-A", "KUBE-SEP-A", "KUBE-SVL-A", "KUBE-EXT-A", "KUBE-FW-A", "KUBE-SVC-USED", "KUBE-SERVICES")
    others = ("KUBE-KUBELET-CANARY", "KUBE-FIREWALL", "CALICO-KUBE-SVC-A", "KUBE-NODE-PORT", "KUBE-MARK-DROP")
    saved = {ChainName("nat", name): SavedChain([]) for name in (*names, *others)}
    saved[ChainName("filter", "KUBE-SVC-A")] = SavedChain([])
    stale = IptablesSnapshot.from_saved(saved).stale_chains(["KUBE-SVC-USED"], ())
    assert {name for _, name in stale} == {"KUBE-SVC-A", "KUBE-SEP-A", "KUBE-SVL-A", "KUBE-EXT-A", "KUBE-FW-A"}
    assert {table for table, _ in stale} == {"nat"}


def test_unused_shards_of_both_tables_are_stale() -> None:
    names = ("KUBE-SVC-10.96.0.0/12", "KUBE-EXT-ABCDEFGHIJ23456/112", "KUBE-SVL-tcp-30000-30015", "KUBE-FW-10.0.0.0/8")
    shards = [ChainName(table, name) for table in ("nat", "filter") for name in names]
    others = [
        ChainName("filter", "KUBE-SVC-10.96.0.0-12"),
        ChainName("filter", "KUBE-EXT-A"),
        ChainName("mangle", names[0]),
    ]
    snapshot = IptablesSnapshot.from_saved({chain: SavedChain([]) for chain in (*shards, *others)})
    assert snapshot.stale_chains([], ()) == shards
    assert snapshot.stale_chains([], {shards[0], shards[-1]}) == shards[1:-1]


def test_dispatch_rules_are_in_the_order_of_service_and_port_names() -> None:
    ledger = IptablesLedger()
    ledger.put("ns/b", {"/TCP": port((NAT_SERVICES, "b"), (FILTER_SERVICES, "no"))})
    ledger.put("ns/c", {"/TCP": port((NAT_SERVICES, "c"))})
    ledger.put("ns/d", {"/TCP": port((NAT_SERVICES, "d"))})
    changed = {
        "ns/a": {"y/TCP": port((NAT_SERVICES, "a-y")), "x/TCP": port((NAT_SERVICES, "a-1"), (NAT_SERVICES, "a-2"))},
        "ns/c": {"/TCP": port((NAT_SERVICES, "c-new"))},
        "ns/d": {},
    }
    rules = ledger.dispatch_rules((NAT_SERVICES, NAT_NODEPORTS), changed)
    assert [ensured.rule for ensured in rules[NAT_SERVICES]] == ["a-1", "a-2", "a-y", "b", "c-new"]
    assert rules[NAT_NODEPORTS] == []
    assert FILTER_SERVICES not in rules
    assert ledger.dispatch_rules((), changed) == {}


def test_changed_dispatch_chains() -> None:
    old = {"/TCP": port((NAT_SERVICES, "a"), (NAT_NODEPORTS, "b"), KUBE_SVC_A="x")}
    assert (
        changed_dispatch_chains(old, {"/TCP": port((NAT_SERVICES, "a"), (NAT_NODEPORTS, "b"), KUBE_SVC_A="y")}) == set()
    )
    assert changed_dispatch_chains(old, {"/TCP": port((NAT_SERVICES, "a"), (NAT_NODEPORTS, "c"))}) == {NAT_NODEPORTS}
    assert changed_dispatch_chains(old, {"/TCP": port((NAT_SERVICES, "a"), (FILTER_SERVICES, "b"))}) == {
        NAT_NODEPORTS,
        FILTER_SERVICES,
    }
    assert changed_dispatch_chains(old, {}) == {NAT_SERVICES, NAT_NODEPORTS} == changed_dispatch_chains({}, old)


def test_empty_record_removes_the_service() -> None:
    ledger = IptablesLedger()
    ledger.put("ns/a", {"/TCP": port((NAT_SERVICES, "a"))})
    ledger.put("ns/a", {})
    ledger.put("ns/b", {})
    assert ledger.services == {}


def test_rule_counts_follow_every_change() -> None:
    ledger = IptablesLedger()
    ledger.put_base({}, Counter({"nat": 5, "filter": 3}))
    ledger.put(
        "ns/a", {"/TCP": port((NAT_SERVICES, "a"), (FILTER_SERVICES, "b"), KUBE_SVC_A="1\n2\n3", KUBE_SEP_A="4")}
    )
    assert ledger.rule_counts == {"nat": 5 + 1 + 4, "filter": 3 + 1}
    ledger.put("ns/a", {"/TCP": port((NAT_SERVICES, "a"))})
    assert ledger.rule_counts == {"nat": 6, "filter": 3}
    ledger.put("ns/a", {})
    ledger.put_base({}, Counter({"nat": 4}))
    assert ledger.rule_counts == {"nat": 4, "filter": 0}
    ledger.dispatch = {NAT_SERVICES: DispatchRecord(0, {}, 3), FILTER_SERVICES: DispatchRecord(0, {}, 2)}
    assert ledger.rule_counts == {"nat": 7, "filter": 2}
