"""Quarantine: Services whose rules the kernel rejects, what is reported about them, and when they are tried again."""

from __future__ import annotations

import pytest

from kproxy.model.context import Context
from kproxy.model.delta import Delete, Upsert
from kproxy.model.sync_report import ApplyResult, Plans, SyncError, SyncReport, SyncResult
from kproxy.model.types import Family, Service, ServicePort
from kproxy.sync.family_sync import FamilySync
from kproxy.sync.quarantine import FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS, Quarantine
from tests.inprocess import EMPTY_LISTS, ReconciledProxy, StubBackend

V4 = Family.IPV4
ENTERED = "IPv4: Service ns/bad is quarantined: the kernel rejected its rules: invalid argument"
ENDED = "IPv4: Service ns/bad is no longer quarantined: the kernel accepted its rules"


def service(name: str, port: int = 80) -> Service:
    return Service("ns", name, (f"10.96.0.{ord(name[0])}",), (ServicePort("", port, "TCP"),))


class RejectingBackend(StubBackend):
    """A backend whose kernel rejects the Services in `bad`, with a reason each."""

    def __init__(self) -> None:
        self.bad: dict[str, str] = {}
        self.fails = False
        self.syncs: list[set[str]] = []

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        services = dict(plans.by_service())
        self.syncs.append(set(services))
        if self.fails:
            raise SyncError("no")
        self.needs_full_sync = False
        return ApplyResult(
            {}, {}, rejected={key: self.bad[key] for key, ports in services.items() if ports and key in self.bad}
        )


class QuarantineProxy(ReconciledProxy):
    """A proxy of IPv4 with a good and a bad Service, synced once."""

    def __init__(self) -> None:
        self.backend = RejectingBackend()
        self.backend.bad = {"ns/bad": "invalid argument"}
        self.reports: list[SyncReport] = []
        super().__init__(
            {V4: FamilySync(self.backend, lambda _: Context(V4, "node-1"))},
            min_interval=0.0,
            on_sync=[self.reports.append],
            check_interval=10_000.0,
            full_check_interval=10_000.0,
        )
        self.apply(*EMPTY_LISTS, Upsert(service("bad")), Upsert(service("good")))
        self.sync_after()

    @property
    def result(self) -> SyncResult:
        """The result of the last sync, which succeeded."""
        result = self.reports[-1].result
        assert result is not None
        return result

    def messages(self) -> list[str]:
        """Return the transitions that the last sync reported."""
        return [transition.message for transition in self.result.transitions]


def test_rejected_service_is_quarantined_and_reported_once() -> None:
    proxy = QuarantineProxy()
    assert proxy.messages() == [ENTERED]
    assert [(each.reason, each.is_warning) for each in proxy.result.transitions] == [("Quarantined", True)]
    assert proxy.result.counts.quarantined == 1
    proxy.apply(Upsert(service("other")))
    assert proxy.sync_after() is True
    assert proxy.backend.syncs[-1] == {"ns/other"}
    assert (proxy.messages(), proxy.result.counts.quarantined) == ([], 1)


def test_quarantined_service_is_tried_again_with_growing_delays() -> None:
    proxy = QuarantineProxy()
    delays = []
    for _ in range(8):
        wait = proxy.reconciler.sync_wait()
        assert wait is not None
        delays.append(wait)
        proxy.sync_after(wait)
        assert proxy.backend.syncs[-1] == {"ns/bad"}
        assert proxy.messages() == []
    assert delays == [min(FIRST_RETRY_SECONDS * 2**number, MAX_RETRY_SECONDS) for number in range(8)]
    proxy.backend.bad.clear()
    proxy.sync_after(proxy.reconciler.sync_wait() or 0.0)
    assert proxy.messages() == [ENDED]
    assert [(each.reason, each.is_warning) for each in proxy.result.transitions] == [("QuarantineEnded", False)]
    assert proxy.result.counts.quarantined == 0
    assert proxy.reconciler.sync_wait() is None


def test_quarantined_service_is_tried_again_when_it_changes() -> None:
    proxy = QuarantineProxy()
    for _ in range(3):
        proxy.sync_after(proxy.reconciler.sync_wait() or 0.0)
    proxy.apply(Upsert(service("bad", 81)))
    proxy.sync_after()
    assert proxy.backend.syncs[-1] == {"ns/bad"}
    assert proxy.reconciler.sync_wait() == FIRST_RETRY_SECONDS, "a changed Service starts with the shortest delay"


def test_quarantined_service_is_tried_again_in_every_full_check() -> None:
    proxy = QuarantineProxy()
    proxy.sync_after(20_000)
    assert proxy.backend.syncs[-1] == {"ns/bad", "ns/good"}


def test_changed_reason_is_reported() -> None:
    proxy = QuarantineProxy()
    proxy.backend.bad["ns/bad"] = "no such file"
    proxy.sync_after(FIRST_RETRY_SECONDS)
    assert proxy.messages() == [ENTERED.replace("invalid argument", "no such file")]


def test_reason_with_another_line_number_is_not_reported_again() -> None:
    """The input of iptables-restore also contains other Services: the position of the same rule varies."""
    proxy = QuarantineProxy()
    reason = "iptables-restore failed with status 4: line {}: RULE_APPEND failed (Invalid argument)"
    messages = []
    for number in (18, 6, 12, 6, 18):
        proxy.backend.bad["ns/bad"] = reason.format(number)
        proxy.sync_after(proxy.reconciler.sync_wait() or 0.0)
        messages += proxy.messages()
    assert messages == [ENTERED.replace("invalid argument", reason.format(18))]
    proxy.backend.bad["ns/bad"] = reason.format(18).replace("RULE_APPEND", "CHAIN_ADD")
    proxy.sync_after(proxy.reconciler.sync_wait() or 0.0)
    assert len(proxy.messages()) == 1


def test_deleted_service_leaves_the_quarantine_silently() -> None:
    proxy = QuarantineProxy()
    proxy.apply(Delete(Service, "ns", "bad"))
    proxy.sync_after()
    assert (proxy.messages(), proxy.result.counts.quarantined) == ([], 0)
    assert proxy.reconciler.sync_wait() is None


def test_retry_that_fails_waits_for_the_schedule() -> None:
    proxy = QuarantineProxy()
    proxy.backend.fails = True
    assert proxy.sync_after(FIRST_RETRY_SECONDS) is False
    wait = proxy.reconciler.sync_wait()
    assert wait is not None
    assert wait > 0, "a failed retry must not be repeated at once"
    proxy.backend.fails = False
    proxy.sync_after(wait)
    assert "ns/bad" in proxy.backend.syncs[-1]


def test_plans_of_rejected_services_do_not_reach_the_listeners() -> None:
    proxy = QuarantineProxy()
    proxy.apply(Upsert(service("bad", 81)), Upsert(service("good", 81)))
    proxy.sync_after()
    assert set(proxy.result.plans) == {"ns/good"}


@pytest.mark.parametrize("covered", [["ns/a"], ["ns/a", "ns/b"]])
def test_services_that_a_sync_does_not_cover_stay_quarantined(covered: list[str]) -> None:
    quarantine = Quarantine(V4)
    quarantine.update(["ns/a", "ns/b"], {"ns/a": "no", "ns/b": "no"}, 0.0)
    quarantine.update(covered, {}, 1.0)
    assert set(quarantine.services) == {"ns/a", "ns/b"} - set(covered)
