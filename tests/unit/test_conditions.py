"""Conditions of Services, such as no endpoints or conflicting frontends: when they are logged, counted and reported."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from msgspec.structs import replace

from kproxy.model.delta import Delete, Invalid, Replace, Upsert
from kproxy.model.sync_report import ServiceCounts, SyncError, SyncReport, SyncResult
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Node, Service, ServicePort
from kproxy.sync.log_summary import PERIOD, Summary, synced_text
from kproxy.sync.service_events import LINES_PER_SYNC, ServiceEventListener
from tests.inprocess import FakeKernelProxy

HTTP, DNS = ServicePort("http", 80, "TCP"), ServicePort("dns", 53, "UDP")


def service(name: str, number: int = 1, *ports: ServicePort, **fields: Any) -> Service:
    addresses = (f"10.96.0.{number}", f"fd00:96::{number}")
    return Service("ns", name, addresses, ports or (HTTP,), **fields)


def slices(name: str, *nodes: str, ports: tuple[ServicePort, ...] = (HTTP,)) -> EndpointSlice:
    endpoints = tuple(Endpoint(f"10.244.0.{index}", node) for index, node in enumerate(nodes, 1))
    served = tuple(EndpointPort(port.name, 8080, port.protocol) for port in ports)
    return EndpointSlice("ns", name, f"ns/{name}", Family.IPV4, endpoints, served)


class ConditionsProxy(FakeKernelProxy):
    """A proxy of one IP family that returns the condition transitions of each sync."""

    def result_of(self, *objects: Service | EndpointSlice) -> SyncResult:
        """Sync these objects and return the result."""
        return self.sync(*objects).result

    def transitions(self, *objects: Service | EndpointSlice) -> list[str]:
        """Sync these objects and return the messages of the transitions, without the IP family."""
        return [transition.message.removeprefix("IPv4: ") for transition in self.result_of(*objects).transitions]


@pytest.fixture(params=["iptables", "nftables"])
def proxy(request: pytest.FixtureRequest) -> ConditionsProxy:
    return ConditionsProxy(request.param)


LOST = "Service ns/web has no endpoints: new connections are rejected"
BACK = "Service ns/web has endpoints again"


def test_loss_and_return_of_all_endpoints_are_reported_once(proxy: ConditionsProxy) -> None:
    assert proxy.transitions(service("web"), slices("web", "node-1", "node-2")) == []
    assert proxy.transitions(slices("web", "node-2")) == []
    assert proxy.transitions(slices("web")) == [LOST]
    assert proxy.transitions(service("other", 2)) == []
    assert proxy.transitions(slices("web")) == []
    assert proxy.transitions(slices("web", "node-2")) == [BACK]
    assert proxy.transitions(slices("web")) == [LOST]
    proxy.apply(Delete(Service, "ns", "web"))
    assert proxy.transitions() == []


@pytest.mark.parametrize("removed_from", ["cluster", "ip-family"])
def test_service_that_is_no_longer_served_is_not_reported_as_recovered(
    proxy: ConditionsProxy, removed_from: str
) -> None:
    claim = {"external_ips": ("203.0.113.1",)}
    proxy.sync(service("a", 1, **claim), slices("a", "node-1"))
    proxy.sync(service("web", 2, **claim), slices("web", "node-1"))
    assert proxy.transitions(slices("web")) == [LOST]
    if removed_from == "cluster":
        proxy.apply(Delete(Service, "ns", "web"))
    else:
        proxy.apply(Upsert(Service("ns", "web", ("fd00:96::2",), (HTTP,))))
    assert proxy.transitions() == []
    proxy.apply(Upsert(service("web", 2)))
    assert proxy.transitions(slices("web", "node-1")) == []


def test_new_service_without_endpoints_is_counted_but_not_reported(proxy: ConditionsProxy) -> None:
    assert proxy.transitions(service("web")) == []
    assert proxy.result_of().counts == ServiceCounts(without_endpoints=1)
    assert proxy.transitions(slices("web", "node-1")) == []
    assert proxy.transitions(slices("web")) == [LOST]


@pytest.mark.parametrize("failed", [False, True], ids=["after-node-change", "after-failure"])
def test_loss_of_endpoints_is_reported_by_a_full_sync(proxy: ConditionsProxy, failed: bool) -> None:
    proxy.sync(service("web"), slices("web", "node-1"))
    proxy.apply(Upsert(slices("web")))
    if failed:
        proxy.forget()
    else:
        proxy.apply(Upsert(Node("node-1", zone="other")))
    assert proxy.transitions() == [LOST]
    proxy.forget()
    assert proxy.transitions() == []


def test_port_without_endpoints_is_named(proxy: ConditionsProxy) -> None:
    both = (HTTP, DNS)
    proxy.sync(service("web", 1, *both), slices("web", "node-1", ports=both))
    lost = "Service ns/web has no endpoints at port dns: new connections are rejected"
    assert proxy.transitions(slices("web", "node-1", ports=(HTTP,))) == [lost]
    assert proxy.transitions(slices("web", ports=both)) == [LOST]
    assert proxy.transitions(slices("web", "node-1", ports=both)) == [BACK]


def test_local_policy_without_local_endpoints_is_counted_but_not_reported(proxy: ConditionsProxy) -> None:
    result = proxy.result_of(service("web", internal_local=True), slices("web", "node-2"))
    assert (result.counts, result.transitions) == (ServiceCounts(dropped=1), ())
    assert proxy.result_of(slices("web", "node-1")).counts == ServiceCounts()


def test_all_conditions_are_counted(proxy: ConditionsProxy) -> None:
    proxy.apply(Replace(Service, (service("a"), service("b", 2), service("c", 3)), (("ns", "bad"),), ignored=2))
    shared = {"external_ips": ("203.0.113.1",)}
    result = proxy.result_of(service("b", 2, **shared), service("c", 3, **shared))
    assert result.counts == ServiceCounts(without_endpoints=3, in_conflict=1, invalid=1, ignored=2)
    proxy.apply(Invalid(Service, "ns", "a"), Delete(Service, "ns", "bad"), Delete(Service, "ns", "b"))
    assert proxy.result_of().counts == ServiceCounts(without_endpoints=2, invalid=1, ignored=2)


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_load_balancer_without_source_ranges_of_its_family_is_reported_as_open(mode: str) -> None:
    balanced = service("web", vips=("203.0.113.1", "2001:db8::1"), source_ranges=("198.51.100.0/24",))
    four, six = ConditionsProxy(mode), ConditionsProxy(mode, Family.IPV6)
    assert four.transitions(balanced, slices("web", "node-1")) == []
    assert [transition.message for transition in six.result_of(balanced).transitions] == [
        "IPv6: Service ns/web has no IPv6 range in loadBalancerSourceRanges: its IPv6 load balancer addresses are "
        "open to all sources; add IPv6 ranges"
    ]
    six.forget()
    assert six.result_of(balanced).transitions == ()
    open_to_all = replace(balanced, source_ranges=("198.51.100.0/24", "::/0"))
    assert six.result_of(open_to_all).transitions == ()
    assert len(six.result_of(balanced).transitions) == 1
    assert six.result_of(replace(balanced, vips=("203.0.113.1",))).transitions == ()


def test_start_and_end_of_a_conflict_are_reported_once(proxy: ConditionsProxy) -> None:
    claim = {"external_ips": ("203.0.113.1",)}
    proxy.sync(service("a", 1, **claim), slices("a", "node-1"))
    (transition,) = proxy.result_of(service("b", 2, **claim), slices("b", "node-1")).transitions
    assert (transition.service, transition.reason) == ("ns/b", "FrontendConflict")
    assert transition.message == (
        "IPv4: ns/b:http and ns/a:http both claim 203.0.113.1:80/TCP: traffic goes to ns/a:http only"
    )
    proxy.forget()
    assert proxy.transitions() == []
    assert proxy.transitions(service("a", 1)) == ["ns/b:http no longer loses 203.0.113.1:80/TCP to ns/a:http"]


def test_transition_is_reported_once_the_kernel_accepted_it() -> None:
    proxy = ConditionsProxy("iptables")
    proxy.sync(service("web"), slices("web", "node-1"))
    proxy.kernel.reject = lambda _: "out of memory"
    with pytest.raises(SyncError):
        proxy.sync(slices("web"))
    proxy.kernel.reject = lambda _: None
    assert proxy.transitions() == [LOST]


# The event listener.


def test_every_warning_is_an_event_but_only_the_first_ones_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    events: list[tuple[str, str, str]] = []
    listener = ServiceEventListener(lambda *event: events.append(event))
    proxy = ConditionsProxy("nftables")
    names = [f"s{number}" for number in range(LINES_PER_SYNC + 3)]
    for number, name in enumerate(names, 1):
        proxy.sync(service(name, number), slices(name, "node-1"))
    listener.on_sync(report(proxy.result_of(*(slices(name) for name in names))))
    assert [event[:2] for event in sorted(events)] == [(f"ns/{name}", "NoEndpoints") for name in sorted(names)]
    assert all(event[2].endswith(" has no endpoints: new connections are rejected") for event in events)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (LINES_PER_SYNC + 1)
    assert caplog.messages[-1] == "IPv4: 3 more Services with reason NoEndpoints not listed"
    events.clear()
    caplog.clear()
    listener.on_sync(report(proxy.result_of(slices(names[0], "node-1"))))
    assert events == []
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "IPv4: Service ns/s0 has endpoints again")
    ]


def report(result: SyncResult) -> SyncReport:
    return SyncReport(Family.IPV4, 0.0, 1.0, result)


# Log lines.


def test_log_line_of_a_sync_omits_counts_that_are_zero() -> None:
    assert synced_text(Family.IPV4, 5, 0.0042, ServiceCounts(), complete=True) == "IPv4: synced 5 services in 4 ms"
    counts = ServiceCounts(without_endpoints=2, dropped=1, in_conflict=1, invalid=1, ignored=1200)
    assert synced_text(Family.IPV6, 1, 1.26, counts, complete=False) == (
        "IPv6: synced 1 changed service in 1.3 s (2 without endpoints, 1 dropped by policy Local, 1 in conflict, "
        "1 invalid, 1,200 ignored)"
    )


def test_summary_covers_one_minute_from_its_first_sync_on() -> None:
    summary = Summary(Family.IPV4)
    assert (summary.wait(0.0), summary.flush(0.0)) == (None, "")
    summary.add(100.0, 1, 0.005, ServiceCounts(), complete=False)
    summary.add(130.0, 20, 1.5, ServiceCounts(without_endpoints=1), complete=False)
    assert (summary.wait(130.0), summary.flush(130.0)) == (PERIOD - 30, "")
    assert summary.wait(100.0 + PERIOD) == 0.0
    assert summary.flush(100.0 + PERIOD) == (
        "IPv4: 2 syncs in the last 60 s: 21 changed services, the longest took 1.5 s (1 without endpoints)"
    )
    assert summary.wait(200.0) is None


@pytest.mark.parametrize(
    ("syncs", "text"),
    [
        (
            [(2, False), (10_000, True), (1, False)],
            "3 syncs in the last 60 s: 3 changed services, 1 of all 10,000 services",
        ),
        ([(10_000, True)], "1 sync in the last 60 s: 1 of all 10,000 services"),
        ([(10_000, True), (9_999, True)], "2 syncs in the last 60 s: 2 of all 9,999 services"),
        ([(0, False)], "1 sync in the last 60 s: 0 changed services"),
    ],
)
def test_syncs_of_all_services_do_not_count_as_changes(syncs: list[tuple[int, bool]], text: str) -> None:
    summary = Summary(Family.IPV4)
    for services, complete in syncs:
        summary.add(0.0, services, 1.0, ServiceCounts(), complete=complete)
    assert summary.flush(PERIOD) == f"IPv4: {text}, the longest took 1.0 s"
    summary.add(PERIOD, 1, 1.0, ServiceCounts(), complete=False)
    assert summary.flush(2 * PERIOD) == "IPv4: 1 sync in the last 60 s: 1 changed service, the longest took 1.0 s"


def test_first_sync_counts_services_without_endpoints_but_does_not_report_them() -> None:
    """`kproxy apply` and `kproxy render` only ever make a first sync."""
    proxy = ConditionsProxy("iptables")
    proxy.store.apply(Upsert(service("web")))
    assert proxy.transitions() == []
    assert proxy.result_of().counts == ServiceCounts(without_endpoints=1)
