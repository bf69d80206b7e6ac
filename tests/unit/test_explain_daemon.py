"""`kproxy explain` with what the daemon says about a Service."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from kproxy.cli.console import CannotTellError
from kproxy.cli.explain import gather
from kproxy.cli.parser import parse
from kproxy.config import configure
from kproxy.diagnose.cluster_objects import cluster_objects
from kproxy.diagnose.explain import explain
from kproxy.diagnose.explain_facts import Facts, KernelDifference, KernelFacts, TrackedFlow
from kproxy.diagnose.explain_report import ServiceExplanation
from kproxy.model.context import Context
from kproxy.model.plan import plan_service
from kproxy.model.service_state import FamilyServiceState, ServiceState
from kproxy.model.types import Family, Service, ServicePort
from tests.unit.explain_cases import BROKEN, PODS, SERVICE, SLICE, UNREADY_SLICE, SetUp, cluster, edit, no_pods

NODE = "node-1"
CONTEXTS = {family: Context(family, NODE, zone="a") for family in Family}


def state(yaml_text: str, **changes: object) -> ServiceState:
    """What a daemon says that has these objects. `changes` are those of its IPv4 family, or of the whole state."""
    key = "shop/api"
    objects = cluster_objects(yaml.safe_load_all(yaml_text))
    service = objects.service(key)
    slices = tuple(each.decoded for each in objects.slices_of(key) if each.decoded is not None)
    families = {
        family: FamilyServiceState(context, plan_service(service, slices, context) if service else ())
        for family, context in CONTEXTS.items()
    }
    own = {name: value for name, value in changes.items() if name in FamilyServiceState.__struct_fields__}
    families[Family.IPV4] = replace(families[Family.IPV4], **own)
    whole = ServiceState(
        key=key,
        mode="nftables",
        node_name=NODE,
        node=objects.nodes[0] if objects.nodes else None,
        complete=True,
        service=service,
        invalid=False,
        slices=slices,
        families=families,
    )
    return replace(whole, **{name: value for name, value in changes.items() if name not in own})


def facts(daemon: ServiceState, yaml_text: str = "", **more: object) -> Facts:
    objects = cluster_objects(yaml.safe_load_all(yaml_text)) if yaml_text else None
    return Facts(daemon.key, daemon.mode, NODE, {}, objects, live=True, daemon=daemon, **more)  # type: ignore[arg-type]


def conclusion(report: ServiceExplanation) -> tuple[str, str | None]:
    return report.verdict, report.reason.code if report.reason else None


SOUND = cluster(SERVICE, SLICE, PODS)


def test_a_sound_service() -> None:
    assert conclusion(explain(facts(state(SOUND)))) == ("WORKS", None)
    assert conclusion(explain(facts(state(SOUND), SOUND))) == ("WORKS", None)


@pytest.mark.parametrize("setup", [each for each in BROKEN if each.verdict == "REJECTED"], ids=lambda setup: setup.name)
def test_the_daemon_plans_and_the_cluster_says_why(setup: SetUp) -> None:
    report = explain(facts(state(setup.yaml), setup.yaml))
    assert conclusion(report) == (setup.verdict, setup.code)


def test_without_the_cluster_the_daemon_knows_the_endpoints() -> None:
    report = explain(facts(state(cluster(SERVICE, UNREADY_SLICE, PODS))))
    assert conclusion(report) == ("REJECTED", "NoReadyEndpoints")
    assert any("Pods" in text for text in report.unseen)


def test_quarantined() -> None:
    report = explain(facts(state(SOUND, quarantined="element 10.96.0.82: File exists"), SOUND))
    assert conclusion(report) == ("NOT PROGRAMMED", "Quarantined")
    assert report.reason is not None
    assert "File exists" in report.reason.message


def test_quarantined_in_one_of_two_families() -> None:
    text = edit(SERVICE, "clusterIPs: [10.96.0.82]", 'clusterIPs: [10.96.0.82, "fd00:96::82"]')
    both = cluster(text, SLICE, PODS)
    assert conclusion(explain(facts(state(both, quarantined="no")))) == ("DEGRADED", "Quarantined")


@pytest.mark.parametrize(
    "changes",
    [
        {"complete": False, "families": {}},
        {"families": {Family.IPV4: FamilyServiceState(None), Family.IPV6: FamilyServiceState(None)}},
        {"pending": True},
        {"failure": "iptables-restore failed: line 3", "failing_seconds": 12.5},
        {"families": {Family.IPV4: FamilyServiceState(None, failure="no iptables")}},
    ],
    ids=["incomplete", "never synced", "pending", "failing", "never succeeded"],
)
@pytest.mark.parametrize("with_cluster", [False, True])
def test_not_synced_yet(changes: dict[str, object], with_cluster: bool) -> None:
    report = explain(facts(state(SOUND, **changes), SOUND if with_cluster else ""))
    assert conclusion(report) == ("NOT PROGRAMMED", "NotSyncedYet")
    failure = changes.get("failure")
    assert report.reason is not None
    assert failure is None or str(failure) in report.reason.message


def test_a_family_that_the_node_does_not_serve() -> None:
    text = SOUND.replace("10.96.0.82", '"fd00:96::82"')
    only_ipv4 = {Family.IPV4: FamilyServiceState(CONTEXTS[Family.IPV4])}
    assert conclusion(explain(facts(state(text, families=only_ipv4)))) == ("NOT PROGRAMMED", "FamilyMissing")


def test_missing_endpoints_precede_a_pending_change() -> None:
    text = cluster(SERVICE, UNREADY_SLICE, PODS)
    assert conclusion(explain(facts(state(text, pending=True)))) == ("REJECTED", "NoReadyEndpoints")


def test_a_daemon_that_is_behind_the_cluster() -> None:
    older = no_pods(SERVICE, edit(SLICE, "port: 8080", "port: 8081"))
    assert conclusion(explain(facts(state(older), SOUND))) == ("NOT PROGRAMMED", "NotSyncedYet")
    assert conclusion(explain(facts(state(older, service=None, slices=()), SOUND))) == (
        "NOT PROGRAMMED",
        "NotSyncedYet",
    )


def test_a_service_that_the_daemon_does_not_have() -> None:
    absent = state(no_pods(SLICE))
    assert conclusion(explain(facts(absent))) == ("NOT PROGRAMMED", "NoSuchService")
    assert conclusion(explain(facts(replace(absent, complete=False)))) == ("NOT PROGRAMMED", "NotSyncedYet")


def test_an_invalid_service_keeps_its_last_version() -> None:
    invalid = cluster(edit(SERVICE, "port: 80,", "port: 80000,"), SLICE, PODS)
    daemon = state(SOUND, invalid=True)
    assert conclusion(explain(facts(daemon, invalid))) == ("DEGRADED", "InvalidObject")
    assert conclusion(explain(facts(daemon))) == ("DEGRADED", "InvalidObject")


DRIFT = KernelFacts((Family.IPV4,), (), (KernelDifference(Family.IPV4, "chain X", "is missing"),), "service-ips")


def test_drifted() -> None:
    report = explain(facts(state(SOUND), SOUND, kernel=DRIFT))
    assert conclusion(report) == ("DEGRADED", "Drifted")
    assert report.reason is not None
    assert "chain X is missing" in report.reason.message
    gone = KernelFacts((Family.IPV4,), (Family.IPV4,))
    assert conclusion(explain(facts(state(SOUND), SOUND, kernel=gone))) == ("NOT PROGRAMMED", "Drifted")


def test_drift_is_a_consequence_of_a_pending_change() -> None:
    assert conclusion(explain(facts(state(SOUND, pending=True), kernel=DRIFT))) == ("NOT PROGRAMMED", "NotSyncedYet")


@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_stale_flows(protocol: str) -> None:
    text = SOUND.replace("protocol: TCP", f"protocol: {protocol}").replace(
        "containerPort: 8080}", f"containerPort: 8080, protocol: {protocol}}}"
    )
    flows = tuple(
        TrackedFlow(Family.IPV4, protocol, "10.96.0.82:80", endpoint, 3, stale)  # type: ignore[arg-type]
        for endpoint, stale in (("10.244.1.99:8080", True), ("10.244.1.5:8080", False))
    )
    report = explain(facts(state(text), text, flows=flows))
    assert conclusion(report) == (("DEGRADED", "StaleConntrack") if protocol == "UDP" else ("WORKS", None))
    assert [flow.stale for flow in report.flows] == [True, False]
    if report.reason is not None:
        assert "conntrack -D -f ipv4 -p udp --orig-dst 10.96.0.82 --dport 80" in report.reason.fix


def test_flows_that_were_never_translated() -> None:
    text = SOUND.replace("protocol: TCP", "protocol: UDP")
    flow = TrackedFlow(Family.IPV4, "UDP", "10.96.0.82:80", "10.96.0.82:80", 1, stale=True)
    report = explain(facts(state(text), flows=(flow,)))
    assert conclusion(report) == ("DEGRADED", "StaleConntrack")
    assert report.reason is not None
    assert "1 tracked UDP flow to 10.96.0.82:80 was never sent to an endpoint" in report.reason.message


def test_a_frontend_of_a_service_that_could_not_be_seen() -> None:
    daemon = state(SOUND)
    assert daemon.service is not None
    external = replace(daemon.service, external_ips=("198.51.100.5",))
    kernel = KernelFacts((Family.IPV4,), owners={"198.51.100.5:80/TCP": "other/web:http"})
    report = explain(facts(replace(daemon, service=external), kernel=kernel))
    assert conclusion(report) == ("DEGRADED", "AddressConflict")


def test_the_daemon_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    options = parse(["explain", "shop/api", "--kernel=false"])
    config = configure(options)[0]
    found = gather(options, config, "shop/api", lambda _: state(SOUND))
    assert (found.mode, found.node_name, found.objects) == ("nftables", NODE, None)
    report = explain(found)
    assert conclusion(report) == ("WORKS", None)
    assert any("API server" in text for text in report.unseen)

    def no_daemon(_: str) -> ServiceState:
        raise CannotTellError("no daemon answers")

    with pytest.raises(CannotTellError, match=r"no daemon answers.*kubeconfig"):
        gather(options, config, "shop/api", no_daemon)


def test_a_service_of_many_ports_is_explained_port_by_port() -> None:
    ports = tuple(ServicePort(f"p{number}", number, "TCP") for number in range(1, 4))
    service = Service("shop", "api", ("10.96.0.82",), ports)
    daemon = replace(state(SOUND), service=service, families={Family.IPV4: FamilyServiceState(CONTEXTS[Family.IPV4])})
    report = explain(facts(daemon))
    assert [port.verdict for port in report.ports] == ["REJECTED"] * 3
    assert conclusion(report) == ("REJECTED", "TargetPortUnresolved")
