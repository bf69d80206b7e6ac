"""Reminders about a Node that does not exist, was deleted, or has no podCIDRs."""

from __future__ import annotations

import logging
import queue
import threading
import time

import pytest

from kproxy.model.delta import Delete, Delta, Replace, Upsert
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Node, Service
from kproxy.sync.node_monitor import NodeMonitor
from kproxy.sync.reconciler import Message, Reconciler, Stop
from kproxy.sync.schedule import Schedule
from tests.lab.waiting import HANG_GUARD

NAME = "--hostname-override (hostnameOverride)"
NODE = Node("node-1")
WITH_CIDRS = Node("node-1", pod_cidrs=("10.244.0.0/24",))


class MonitoredNode:
    """A `NodeMonitor` of node-1 with its store, a clock, and the lines it logs."""

    def __init__(
        self, caplog: pytest.LogCaptureFixture, *, required: bool = True, needs_pod_cidrs: bool = False
    ) -> None:
        caplog.set_level(logging.INFO, logger="kproxy")
        self.missing_calls: list[bool] = []
        self.now = 0.0
        self.store = Store("node-1")
        self.monitor = NodeMonitor(
            "node-1", required=required, needs_pod_cidrs=needs_pod_cidrs, on_missing=self.missing_calls.append
        )
        self._caplog = caplog

    def apply(self, *deltas: Delta) -> float | None:
        """Apply deltas and check; return the seconds until the next reminder."""
        for delta in deltas:
            self.store.apply(delta)
        return self.monitor.check(self.store, self.now)

    def logged(self) -> list[tuple[str, str]]:
        """Return the level and the message of each line since the last call."""
        lines = [(record.levelname, record.getMessage()) for record in self._caplog.records]
        self._caplog.clear()
        return lines


def test_nothing_is_logged_before_the_node_is_listed(caplog: pytest.LogCaptureFixture) -> None:
    node = MonitoredNode(caplog)
    assert node.apply() is None
    assert node.apply(Replace(Service, ()), Replace(EndpointSlice, ())) is None
    assert node.apply(Replace(Node, (NODE,))) is None
    assert (node.logged(), node.monitor.reason, node.missing_calls) == ([], "", [])


def test_missing_node_is_logged_with_backoff_until_it_exists(caplog: pytest.LogCaptureFixture) -> None:
    node = MonitoredNode(caplog)
    assert node.apply(Replace(Node, ())) == 60.0
    ((level, text),) = node.logged()
    assert level == "WARNING"
    assert text.startswith(
        'Node "node-1" not found: zone, addresses and podCIDRs are unknown, and /healthz returns 503; '
    )
    assert NAME in text
    assert "\n" not in text
    assert (node.monitor.reason, node.missing_calls) == (text, [True])
    node.now = 59.0
    assert node.apply(Upsert(Service("ns", "web", ("10.96.0.1",), ()))) == 1.0
    assert node.logged() == []
    node.now = 60.0
    assert node.apply() == 120.0
    assert node.logged() == [("WARNING", text)]
    assert node.apply(Upsert(NODE)) is None
    assert node.logged() == [("INFO", 'Node "node-1" exists')]
    assert (node.monitor.reason, node.missing_calls) == ("", [True, False])


def test_deleted_node_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    node = MonitoredNode(caplog)
    node.apply(Replace(Node, (NODE,)))
    assert node.apply(Upsert(Node("node-1", being_deleted=True))) is None
    assert node.logged() == [], "a Node that is being deleted still exists"
    assert node.apply(Delete(Node, "", "node-1")) == 60.0
    ((level, text),) = node.logged()
    expected = (
        'Node "node-1" was deleted: /healthz returns 503; kproxy keeps its last known zone, addresses and podCIDRs'
    )
    assert (level, text) == ("WARNING", expected)
    node.apply(Upsert(NODE))
    node.logged()
    assert node.apply(Delete(Node, "", "node-1")) == 60.0, "the intervals start over"
    assert node.logged() == [("WARNING", text)]


def test_missing_pod_cidrs_are_logged_until_the_node_has_some(caplog: pytest.LogCaptureFixture) -> None:
    node = MonitoredNode(caplog, needs_pod_cidrs=True)
    assert node.apply(Replace(Node, ())) == 60.0
    ((_, text),) = node.logged()
    assert "nothing is programmed until it exists and has podCIDRs (detectLocalMode: NodeCIDR)" in text
    assert NAME in text
    assert node.apply(Upsert(NODE)) == 60.0
    ((level, text),) = node.logged()
    assert level == "WARNING"
    expected = 'Node "node-1" has no podCIDRs (required by detectLocalMode NodeCIDR): nothing is programmed; '
    assert text.startswith(expected)
    assert (node.monitor.reason, node.missing_calls) == (text, [True, False])
    node.now = 60.0
    assert node.apply() == 120.0
    assert node.logged() == [("WARNING", text)]
    assert node.apply(Upsert(WITH_CIDRS)) is None
    assert node.logged() == [("INFO", 'Node "node-1" exists and has podCIDRs')]
    node.apply(Delete(Node, "", "node-1"))
    assert "nothing is programmed" not in node.logged()[0][1], "the podCIDRs of the deleted Node remain in use"
    node.apply(Upsert(NODE))
    assert "local pod traffic is not detected" in node.logged()[0][1]


def test_node_that_is_not_required_may_be_missing_unless_pod_cidrs_are_needed(caplog: pytest.LogCaptureFixture) -> None:
    node = MonitoredNode(caplog, required=False)
    assert node.apply(Replace(Node, ())) is None
    assert node.apply(Upsert(NODE), Delete(Node, "", "node-1")) is None
    assert (node.logged(), node.monitor.reason, node.missing_calls) == ([], "", [])
    node = MonitoredNode(caplog, required=False, needs_pod_cidrs=True)
    assert node.apply(Replace(Node, ())) == 60.0
    assert len(node.logged()) == 1


@pytest.mark.parametrize("listed", [True, False])
def test_reconciler_logs_reminders_while_no_messages_arrive(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """Reminders do not depend on whether all kinds are listed."""
    monkeypatch.setattr("kproxy.model.log_throttle.FIRST_PAUSE", 0.001)
    reminded = threading.Semaphore(0)

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if 'Node "node-1" not found' in record.getMessage():
                reminded.release()

    handler = Counting()
    logging.getLogger("kproxy.sync.node_monitor").addHandler(handler)
    monitor = NodeMonitor("node-1", required=True, needs_pod_cidrs=False)
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    reconciler = Reconciler(
        Store("node-1"),
        {},
        make_schedule=lambda: Schedule(min_interval=1.0, max_retry=1.0),
        clock=time.monotonic,
        monitor=monitor.check,
    )
    thread = threading.Thread(target=reconciler.run, args=(messages,))
    thread.start()
    try:
        for delta in (Replace(Service, ()), Replace(EndpointSlice, ())) if listed else ():
            messages.put(delta)
        messages.put(Replace(Node, ()))
        assert all(reminded.acquire(timeout=HANG_GUARD) for _ in range(5))
    finally:
        messages.put(Stop())
        thread.join(HANG_GUARD)
        logging.getLogger("kproxy.sync.node_monitor").removeHandler(handler)
