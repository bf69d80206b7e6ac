"""Differences between desired states: objects, configurations, and what they write, without a kernel."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from msgspec.structs import replace

from kproxy.app import dry_run
from kproxy.app.desired_state import from_daemon
from kproxy.cli.main import main
from kproxy.config import Config
from kproxy.config.load import as_document
from kproxy.config.types import Conntrack, IPTables, NFTables
from kproxy.diagnose.difference import RulesDifference
from kproxy.diagnose.difference_configuration import (
    ConfigurationDifference,
    context_effects,
    field_differences,
)
from kproxy.diagnose.difference_iptables import iptables_difference
from kproxy.diagnose.difference_nftables import (
    missing_table,
    nftables_difference,
    rules_of_listing,
    unusable_table,
)
from kproxy.diagnose.difference_objects import LostEndpoint, ObjectsDifference, frontend_text, service_differences
from kproxy.diagnose.report import schema
from kproxy.diagnose.written_rules import Rendering, count_written
from kproxy.iptables.desired_rules import desired_rules, written_rules
from kproxy.iptables.names import NAT_SERVICES, ChainName
from kproxy.iptables.repair import Scope, find_damage
from kproxy.iptables.save_restore import TABLES
from kproxy.model.context import Context, LocalTraffic
from kproxy.model.object_page import ObjectPage
from kproxy.model.plan import ServicePortPlan, TrafficDecision, plan_service
from kproxy.model.service_state import FamilyServiceState, FamilyWaiting, ServiceState
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServiceKey, ServicePort
from kproxy.nftables import names
from kproxy.nftables.desired_table import BASE_SETS, DesiredTable
from kproxy.nftables.elements import SetElement, service_key, set_layout
from kproxy.nftables.ledger import NftablesLedger
from kproxy.nftables.planned_table import planned_ledger, table_items, written_items
from kproxy.nftables.repair import ChainState, TableParts, plan_repair
from kproxy.nftables.rule_content import RuleContent, rule_content
from kproxy.sync.planning import PlannedFamily

NODE = "node-1"
IPV4 = Context(Family.IPV4, NODE, node_address="10.99.0.2", node_port_addresses=("10.99.0.2",))
Plans = dict[ServiceKey, Sequence[ServicePortPlan]]


def plans(*services: Service, endpoints: Mapping[str, Sequence[str]] = {}, context: Context = IPV4) -> Plans:
    """Plan Services. The ports of their endpoints are 8080."""
    return {
        each.key: plan_service(
            each,
            [
                EndpointSlice(
                    each.namespace,
                    each.name,
                    each.key,
                    Family.IPV4,
                    tuple(
                        Endpoint(address, NODE if address.startswith("10.244.1.") else "node-2") for address in found
                    ),
                    tuple(EndpointPort(port.name, 8080, port.protocol) for port in each.ports),
                )
                for name, found in endpoints.items()
                if name == each.name
            ],
            context,
        )
        for each in services
    }


WEB = Service("shop", "web", ("10.96.0.10",), (ServicePort("http", 80, "TCP", 30080),), vips=("192.0.2.9",))
DB = Service("shop", "db", ("10.96.0.20",), (ServicePort("sql", 5432, "TCP"),))
DNS = Service("shop", "dns", ("10.96.0.30",), (ServicePort("dns", 53, "UDP"),))
ENDPOINTS = {"web": ["10.244.1.5", "10.244.2.6"], "db": ["10.244.2.9"], "dns": ["10.244.2.3"]}
ALL = plans(WEB, DB, DNS, endpoints=ENDPOINTS)


def difference(after: Plans) -> dict[ServiceKey, list[str]]:
    """Return the frontends that change, by Service, as the text shows them."""
    found = service_differences("IPv4", ALL, after)
    return {
        each.service: [f"{one.change} {frontend_text(one)} {'; '.join(one.effects)}".strip() for one in each.frontends]
        for each in found
    }


def test_equal_objects_have_no_difference() -> None:
    assert service_differences("IPv4", ALL, plans(WEB, DB, DNS, endpoints=ENDPOINTS)) == ()


def test_a_new_service_adds_all_of_its_frontends() -> None:
    found = service_differences("IPv4", plans(DB, DNS, endpoints=ENDPOINTS), ALL)
    assert [(each.service, each.change) for each in found] == [("shop/web", "added")]
    assert [(each.change, frontend_text(each)) for each in found[0].frontends] == [
        ("added", "ClusterIP 10.96.0.10:80/TCP"),
        ("added", "LoadBalancer 192.0.2.9:80/TCP"),
        ("added", "NodePort 30080/TCP"),
    ]
    assert found[0].endpoints_added == ("10.244.1.5:8080/TCP", "10.244.2.6:8080/TCP")


def test_a_deleted_service_loses_frontends_and_endpoints() -> None:
    found = service_differences("IPv4", ALL, plans(WEB, DB, endpoints=ENDPOINTS))
    assert [(each.service, each.change, each.endpoints) for each in found] == [("shop/dns", "removed", 0)]
    assert found[0].endpoints_removed == (LostEndpoint(endpoint="10.244.2.3:8080", protocol="UDP"),)


def test_another_port_is_a_removed_and_an_added_frontend() -> None:
    moved = replace(DB, ports=(ServicePort("sql", 5433, "TCP"),))
    assert difference(plans(WEB, moved, DNS, endpoints=ENDPOINTS)) == {
        "shop/db": ["removed ClusterIP 10.96.0.20:5432/TCP", "added ClusterIP 10.96.0.20:5433/TCP"]
    }


@pytest.mark.parametrize(
    ("changed", "endpoints", "expected"),
    [
        (
            replace(DB, affinity_seconds=60),
            ENDPOINTS["db"],
            "changed ClusterIP 10.96.0.20:5432/TCP session affinity: 60 s instead of none",
        ),
        (
            DB,
            [],
            "changed ClusterIP 10.96.0.20:5432/TCP connections are rejected, because there is no endpoint; "
            "before: forwarded",
        ),
        (
            replace(DB, internal_local=True),
            ENDPOINTS["db"],
            "changed ClusterIP 10.96.0.20:5432/TCP connections are dropped, because a Local policy finds no endpoint "
            "on this node; before: forwarded; traffic policy Local instead of Cluster",
        ),
    ],
)
def test_another_treatment_is_a_change_with_its_effect(changed: Service, endpoints: list[str], expected: str) -> None:
    assert difference(plans(WEB, changed, DNS, endpoints={**ENDPOINTS, "db": endpoints})) == {"shop/db": [expected]}


def test_source_ranges_restrict_only_the_load_balancer() -> None:
    restricted = replace(WEB, source_ranges=("198.51.100.0/24",))
    assert difference(plans(restricted, DB, DNS, endpoints=ENDPOINTS)) == {
        "shop/web": ["changed LoadBalancer 192.0.2.9:80/TCP clients: 198.51.100.0/24 instead of all"]
    }


def test_connections_of_lost_endpoints_are_those_through_frontends_of_the_service() -> None:
    flows = Counter(
        {
            ("TCP", "10.96.0.10:80", "10.244.2.6:8080"): 3,
            ("TCP", "10.99.0.2:30080", "10.244.2.6:8080"): 2,
            ("TCP", "10.96.0.10:80", "10.244.1.5:8080"): 7,  # this endpoint remains
            ("TCP", "10.96.0.99:80", "10.244.2.6:8080"): 11,  # through another Service
            ("UDP", "10.96.0.10:80", "10.244.2.6:8080"): 13,
        }
    )
    after = plans(WEB, DB, DNS, endpoints={**ENDPOINTS, "web": ["10.244.1.5", "10.244.2.7"]})
    (found,) = service_differences("IPv4", ALL, after, flows)
    assert found.endpoints_removed == (LostEndpoint(endpoint="10.244.2.6:8080", protocol="TCP", connections=5),)
    assert (found.endpoints, found.endpoints_added, found.frontends) == (2, ("10.244.2.7:8080/TCP",), ())


# What is written


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_nothing_is_written_for_the_same_state(mode: str) -> None:
    planned, rendering = PlannedFamily(IPV4, ALL), Rendering(mode, 1000)
    found = count_written(planned, rendering, planned, rendering)
    assert (found.added, found.removed, found.written) == (0, 0, 0)


def test_rules_of_a_new_endpoint_in_iptables_mode() -> None:
    after = plans(WEB, DB, DNS, endpoints={**ENDPOINTS, "db": ["10.244.2.9", "10.244.2.10"]})
    found = count_written(
        PlannedFamily(IPV4, ALL), Rendering("iptables", 1000), PlannedFamily(IPV4, after), Rendering("iptables", 1000)
    )
    # Two rules in the endpoint's chain, and one jump to it. The jump to the other endpoint is written again.
    assert (found.added, found.removed, found.written) == (3, 0, 4)
    old, new = desired_rules(ALL, IPV4, 1000), desired_rules(after, IPV4, 1000)
    assert len(new.chains) == len(old.chains) + 1
    assert written_rules(old, after, IPV4, 1000) == 4


def test_elements_of_a_new_endpoint_in_nftables_mode() -> None:
    after = plans(WEB, DB, DNS, endpoints={**ENDPOINTS, "db": ["10.244.2.9", "10.244.2.10"]})
    ledger = planned_ledger(ALL, IPV4)
    new = table_items(planned_ledger(after, IPV4), IPV4) - table_items(ledger, IPV4)
    assert {name for name, _ in new} == {names.SERVICE_ENDPOINTS, names.SERVICE_IPS}
    # The verdict of the frontend is another one, because it has two endpoints, and its element is replaced.
    assert written_items(ledger, after, IPV4) >= new.total()
    assert table_items(ledger, IPV4) == table_items(planned_ledger(after, IPV4), IPV4)


def test_another_mode_writes_everything() -> None:
    planned = PlannedFamily(IPV4, ALL)
    found = count_written(planned, Rendering("iptables", 1000), planned, Rendering("nftables", 1000))
    assert found.written == found.added == table_items(planned_ledger(ALL, IPV4), IPV4).total()
    assert found.removed == desired_rules(ALL, IPV4, 1000).rules().total()


# Configurations


def test_fields_of_the_configuration_and_what_they_mean() -> None:
    before = Config()
    after = Config(
        iptables=IPTables(masquerade_bit=10), nftables=NFTables(masquerade_all=True), conntrack=Conntrack(min=5)
    )
    found = {each.field: each for each in field_differences(as_document(before), as_document(after), "iptables")}
    assert found.keys() == {"iptables.masqueradeBit", "nftables.masqueradeAll", "conntrack.min"}
    bit = found["iptables.masqueradeBit"]
    assert (bit.before, bit.after, bit.changes_rules) == (14, 10, True)
    assert "mark of packets to masquerade" in bit.meaning
    assert not found["nftables.masqueradeAll"].changes_rules
    assert found["nftables.masqueradeAll"].meaning == "no effect in iptables mode"
    assert found["conntrack.min"].meaning == "changes no rules"


def test_every_documented_meaning_belongs_to_a_field() -> None:
    from kproxy.diagnose.difference_configuration import MEANINGS, _flat

    document = {**as_document(Config()), "kproxy": {"iptablesDispatchThreshold": 1, "controlSocket": True}}
    assert MEANINGS.keys() <= {name for name, _ in _flat(document)}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"masquerade_mark": 0x400}, "packets to masquerade have the mark 0x400 instead of 0x4000"),
        ({"masquerade_all": True}, "all traffic to ClusterIPs is masqueraded"),
        ({"node_port_addresses": None}, "NodePorts accept connections to all local addresses instead of 10.99.0.2"),
        ({"localhost_node_ports": True}, "NodePorts also accept connections to 127.0.0.1"),
        ({"drop_invalid": False}, "packets in conntrack state INVALID are no longer dropped"),
        (
            {"local_traffic": LocalTraffic(interface="cni0")},
            "local pods are recognized by their interface (cni0) instead of nothing, so that no traffic to ClusterIPs "
            "counts as traffic from outside",
        ),
    ],
)
def test_effects_of_a_context(changed: dict[str, object], expected: str) -> None:
    assert context_effects(IPV4, replace(IPV4, **changed)) == (expected,)
    assert context_effects(IPV4, IPV4) == ()


# Damage, in iptables mode


class NoKernel:
    """Other programs have no rules."""

    def has_rule(self, chain: ChainName, rule: str) -> bool | None:
        return False

    def list_rules(self, chains: Iterable[ChainName]) -> dict[ChainName, list[str]]:
        return {}


def damaged(change: dict[ChainName, list[str] | None]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Return what is different if some chains have other rules, or do not exist."""
    desired = desired_rules(ALL, IPV4, 1000)
    snapshot = desired.snapshot()
    found = {chain: rules for chain, rules in change.items() if rules is not None}
    for chain, rules in change.items():
        snapshot.digests.pop(chain, None)
        snapshot.rules.pop(chain, None)
        if rules is not None:
            snapshot.digests[chain] = hash("\n".join(rules))
            snapshot.rules[chain] = rules
    damage = find_damage(Scope(tables=frozenset(TABLES)), snapshot, desired.ledger, IPV4, NoKernel())
    report = iptables_difference(desired, damage, found)
    return [(each.change, each.kind, each.name, each.services) for each in report.differences]


def rules_of(chain: ChainName) -> list[str]:
    return desired_rules(ALL, IPV4, 1000).chains[chain].split("\n")


def test_intact_rules_of_iptables_mode_have_no_difference() -> None:
    assert damaged({}) == []


def test_missing_extra_and_changed_rules_are_named_with_their_service() -> None:
    rules = rules_of(NAT_SERVICES)
    (web,) = [rule for rule in rules if "shop/web:http cluster IP" in rule]
    others = [rule for rule in rules if rule != web]
    stranger = '-A KUBE-SERVICES -d 10.96.0.77/32 -p tcp -m comment --comment "old/one:http cluster IP" -j ACCEPT'
    assert damaged({NAT_SERVICES: others}) == [("missing", "rule", "KUBE-SERVICES", ("shop/web",))]
    assert damaged({NAT_SERVICES: [*rules, stranger]}) == [("extra", "rule", "KUBE-SERVICES", ("old/one",))]
    changed = web.replace("--dport 80 ", "--dport 81 ")
    assert damaged({NAT_SERVICES: [*others, changed]}) == [("changed", "rule", "KUBE-SERVICES", ("shop/web",))]
    assert damaged({NAT_SERVICES: rules[::-1]}) == [("changed", "chain", "KUBE-SERVICES", ())]


def test_chains_of_a_service() -> None:
    chain = next(each for each in desired_rules(ALL, IPV4, 1000).chains if each.name.startswith("KUBE-SEP-"))
    (owner,) = {key for key in ALL if any(f'"{key}:' in rule for rule in rules_of(chain))}
    assert damaged({chain: None}) == [("missing", "chain", chain.name, (owner,))]
    assert damaged({chain: [*rules_of(chain), f"-A {chain.name} -j RETURN"]}) == [
        ("extra", "rule", chain.name, (owner,))
    ]
    stale = ChainName("nat", "KUBE-SVC-AAAAAAAAAAAAAAAA")
    rule = f'-A {stale.name} -m comment --comment "old/one:http" -j RETURN'
    assert damaged({stale: [rule]}) == [("extra", "chain", stale.name, ("old/one",))]


def test_a_missing_jump_from_a_chain_of_other_programs() -> None:
    forward = ChainName("filter", "FORWARD")
    rules = desired_rules(ALL, IPV4, 1000).snapshot().rules[forward]
    kept = [rule for rule in rules if not rule.endswith("-j KUBE-FORWARD")]
    assert damaged({forward: kept}) == [("missing", "rule", "FORWARD", ())]


# Damage, in nftables mode


def table_parts(ledger: NftablesLedger) -> TableParts:
    """Return the parts of a table that is as it must be."""
    desired = DesiredTable(ledger, Family.IPV4)
    parts = TableParts(whole_sets={*BASE_SETS})
    for name in desired.set_names():
        definition = desired.set(name)
        assert definition is not None
        parts.sets[name] = set_layout(definition, Family.IPV4)
    parts.elements = {name: {each.key: each for each in desired.elements(name)} for name in BASE_SETS}
    for name in desired.chain_names():
        chain = desired.chain(name)
        assert chain is not None
        parts.chains[name] = ChainState(chain.hook, [rule_content(rule, Family.IPV4) for rule in chain.rules])
    return parts


def described(ledger: NftablesLedger, parts: TableParts) -> list[tuple[str, str, str, tuple[str, ...]]]:
    repair = plan_repair(DesiredTable(ledger, Family.IPV4), parts)
    found = nftables_difference(ledger, Family.IPV4, parts, repair)
    return [(each.change, each.kind, each.name, each.services) for each in found.differences]


def test_elements_are_named_with_their_service() -> None:
    ledger = planned_ledger(ALL, IPV4)
    parts = table_parts(ledger)
    assert described(ledger, parts) == []
    verdicts = parts.elements[names.SERVICE_IPS]
    web, db = service_key("10.96.0.10", "TCP", 80), service_key("10.96.0.20", "TCP", 5432)
    stranger = service_key("10.96.0.77", "TCP", 80)
    del verdicts[web]
    verdicts[db] = SetElement(db, "", "shop/db:sql")
    verdicts[stranger] = SetElement(stranger, "", "old/one:http")
    cluster_ips = parts.elements[names.CLUSTER_IPS]
    del cluster_ips[ledger.services["shop/dns"].cluster_ip]
    endpoints = parts.elements[names.SERVICE_ENDPOINTS]
    key = next(each for each in endpoints if each.startswith(web))
    endpoints[key] = SetElement(key, bytes(8))
    assert described(ledger, parts) == [
        ("missing", "element", "cluster-ips", ("shop/dns",)),
        ("changed", "element", "service-endpoints", ("shop/web",)),
        ("missing", "element", "service-ips", ("shop/web",)),
        ("changed", "element", "service-ips", ("shop/db",)),
        ("extra", "element", "service-ips", ("old/one",)),
    ]


def test_chains_and_sets_of_a_service_with_session_affinity() -> None:
    sticky = plans(WEB, replace(DB, affinity_seconds=60), DNS, endpoints=ENDPOINTS)
    ledger = planned_ledger(sticky, IPV4)
    chain = next(each.name for each in ledger.services["shop/db"].chains)
    parts = table_parts(ledger)
    parts.chains[chain] = None
    assert described(ledger, parts) == [("missing", "chain", chain, ("shop/db",))]
    parts = table_parts(ledger)
    state = parts.chains[chain]
    assert state is not None
    state.rules.append(RuleContent((b"x",), "someone else"))
    parts.sets[f"affinity-{'A' * 8}-old/one/tcp/http__10.0.0.1/80"] = next(iter(parts.sets.values()))
    repair = plan_repair(DesiredTable(ledger, Family.IPV4), parts)
    first, second = nftables_difference(ledger, Family.IPV4, parts, repair).differences
    assert (first.change, first.services, first.expected) == ("changed", ("shop/db",), ())
    assert first.found == ('(a rule that is not kproxy\'s) comment "someone else"',)
    assert (second.change, second.kind, second.services) == ("extra", "set", ("old/one",))
    # With the listing of nft, the rule itself is shown.
    listing = "table ip kube-proxy {\n\tchain x {\n\t\ttype nat hook output priority 0; policy accept;\n"
    listing += "".join(f"\t\trule {number}\n" for number in range(len(state.rules))) + "\t}\n}\n"
    listed = {chain: rules_of_listing(listing)}
    first = nftables_difference(ledger, Family.IPV4, parts, repair, listed).differences[0]
    assert first.found == (f"rule {len(state.rules) - 1}",)


def test_whole_tables() -> None:
    (missing,) = missing_table(planned_ledger(ALL, IPV4), Family.IPV4).differences
    assert missing.remark == "does not exist: no Service works"
    (unusable,) = unusable_table(Family.IPV4, "set x has a different type").differences
    assert unusable.remark == "must be replaced: set x has a different type"
    assert (missing.change, unusable.change) == ("missing", "changed")


# Commands that need no privileges


OBJECTS = """\
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Node, metadata: {name: node-1}, status: {addresses: [{type: InternalIP, address: 10.99.0.2}]}}
- {apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: kubernetes}, spec: {cidrs: [10.96.0.0/12]}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.10, clusterIPs: [10.96.0.10], ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.5]}, {addresses: [10.244.2.6]}]
"""
FLAGS = ("--hostname-override=node-1", "--cluster-cidr=10.244.0.0/16")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Object files before and after a change."""
    before, after = tmp_path / "before.yaml", tmp_path / "after.yaml"
    before.write_text(OBJECTS)
    after.write_text(OBJECTS.replace("10.244.2.6", "10.244.2.7"))
    return str(before), str(after)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_diff_against_other_objects(mode: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["diff", f"--objects={files[0]}", f"--proxy-mode={mode}", *FLAGS]
    assert main([*arguments, f"--against={files[0]}"]) == 0
    assert " no difference" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, f"--against={files[1]}"]) == 1
    text = capsys.readouterr().out
    without_node = Path(files[0]).with_name("services.yaml")
    without_node.write_text(OBJECTS.partition("---\n")[2])
    assert main([*arguments, f"--against={without_node}"]) == 0, "the Node and the ServiceCIDRs remain"
    capsys.readouterr()
    assert "+ endpoint 10.244.2.7:8080/TCP" in text
    assert "- endpoint 10.244.2.6:8080/TCP" in text
    assert max(map(len, text.splitlines())) <= 100
    assert main([*arguments, f"--against={files[1]}", "-o", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema(ObjectsDifference)).validate(report)
    assert [each["service"] for each in report["services"]] == ["shop/web"]
    ipv4, ipv6 = report["rules"]
    assert (ipv4["added"] > 0, ipv4["removed"] > 0, ipv6["written"]) == (True, True, 0)


def test_diff_against_another_configuration(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    config.write_text(f"{header}iptables: {{masqueradeBit: 10}}\n")
    arguments = ["diff", f"--objects={files[0]}", f"--against-config={config}", *FLAGS]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "iptables.masqueradeBit: 10 instead of 14" in text
    assert "packets to masquerade have the mark 0x400 instead of 0x4000" in text
    assert main([*arguments, "-o", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema(ConfigurationDifference)).validate(report)
    assert all(each["written"] > 0 for each in report["rules"])
    config.write_text(header)
    assert main(arguments) == 0


def test_diff_against_other_node_port_addresses(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    arguments = ["diff", f"--objects={files[0]}", f"--against-config={config}", *FLAGS]
    config.write_text(f"{header}nodePortAddresses: [primary, localhost]\n")
    assert main(arguments) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "NodePorts accept connections to 10.99.0.2, 127.0.0.1 instead of all local addresses" in text
    config.write_text(f"{header}nodePortAddresses: [all]\n")
    assert main(arguments) == 1
    assert "NodePorts accept connections" not in capsys.readouterr().out, "all is the default in iptables mode"
    config.write_text(f"{header}mode: iptables\n")
    assert main(arguments) == 0, "iptables is the mode that is used if none is set"


def test_diff_of_a_dump(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = tmp_path / "rules"
    dump.write_text("*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j ACCEPT\nCOMMIT\n")
    arguments = ["diff", f"--objects={files[0]}", f"--dump={dump}", *FLAGS]
    assert main([*arguments, "-o", "json"]) == 1
    report = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema(RulesDifference)).validate(report)
    (family,) = report["families"]
    assert {each["change"] for each in family["differences"]} == {"missing"}
    assert ["shop/web"] in [each["services"] for each in family["differences"]]
    dump.write_text("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n")
    assert main(arguments) == 1
    assert "kproxy's 16 chains with 31 rules do not exist: no Service works" in capsys.readouterr().out
    dump.write_text("*nat\n")
    assert main(arguments) == 2
    assert "is cut off" in capsys.readouterr().err


def test_usage_errors(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "--dump=x"]) == 2
    assert main(["diff", f"--objects={files[0]}", "--dump=x", "--proxy-mode=nftables"]) == 2
    assert main(["apply", f"--objects={files[0]}", "-o", "json"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    with pytest.raises(SystemExit) as exited:
        main(["diff", "--against=x", "--against-config=y"])
    assert exited.value.code == 2


def empty_state(context: Context | None) -> ServiceState:
    """Return what a daemon in nftables mode knows about a Service that does not exist."""
    return ServiceState(
        "/",
        "nftables",
        NODE,
        Node(NODE),
        complete=True,
        service=None,
        invalid=False,
        slices=(),
        families={Family.IPV4: FamilyServiceState(context)},
        iptables_dispatch_threshold=500,
    )


def test_the_state_of_a_daemon_gives_the_same_plans() -> None:
    context = replace(IPV4, service_cidrs=("10.96.0.0/12",))
    slices = (
        EndpointSlice(
            "shop", "s", "shop/db", Family.IPV4, (Endpoint("10.244.2.9"),), (EndpointPort("sql", 5432, "TCP"),)
        ),
    )
    pages = [
        ObjectPage((WEB,), (), Node(NODE), (), more=True),
        ObjectPage((DB,), slices, Node(NODE), (), more=False),
    ]
    waiting = {Family.IPV4: FamilyWaiting(("shop/web", "shop/db"), {"shop/db": "no such file"})}
    state = from_daemon(pages, waiting, empty_state(context))
    assert (state.mode, state.node_name, state.services) == ("nftables", NODE, 2)
    assert state.dispatch_threshold == 500
    planned = state.families[Family.IPV4]
    assert planned.context == context
    assert planned.plans["shop/db"][0].cluster_endpoints == ("10.244.2.9:5432",)
    assert state.notes == (
        "IPv4: the kernel rejects the rules of shop/db: no such file",
        "IPv4: a change of shop/web has not been programmed yet",
    )
    with pytest.raises(SyncError, match="has not programmed any rules yet"):
        from_daemon([], {}, empty_state(None))


def test_decisions_have_a_text() -> None:
    from kproxy.diagnose.difference_objects import _OUTCOMES

    assert _OUTCOMES.keys() == set(TrafficDecision)


def test_a_dry_run_does_not_use_the_lock_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", "/run/mine.lock")
    with dry_run._own_lock_file():
        own = os.environ["XTABLES_LOCKFILE"]
        assert own != "/run/mine.lock"
        assert Path(own).parent.is_dir()
    assert os.environ["XTABLES_LOCKFILE"] == "/run/mine.lock"
    assert not Path(own).parent.exists()
    monkeypatch.delenv("XTABLES_LOCKFILE")
    with dry_run._own_lock_file():
        pass
    assert "XTABLES_LOCKFILE" not in os.environ
