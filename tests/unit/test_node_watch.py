"""What is said of a Node that does not exist, is deleted, or has no pod CIDRs yet."""

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

HANG_GUARD = 30.0
NAME = "--hostname-override (hostnameOverride)"
NODE = Node("node-1")
WITH_CIDRS = Node("node-1", pod_cidrs=("10.244.0.0/24",))


class Scene:
    """A watch of node-1, its store, and what it said."""

    def __init__(
        self, caplog: pytest.LogCaptureFixture, *, required: bool = True, needs_pod_cidrs: bool = False
    ) -> None:
        caplog.set_level(logging.INFO, logger="kproxy")
        self.missing: list[bool] = []
        self.now = 0.0
        self.store = Store("node-1")
        self.watch = NodeMonitor(
            "node-1", required=required, needs_pod_cidrs=needs_pod_cidrs, on_missing=self.missing.append
        )
        self._caplog = caplog

    def take(self, *deltas: Delta) -> float | None:
        for delta in deltas:
            self.store.apply(delta)
        return self.watch.check(self.store, self.now)

    def said(self) -> list[tuple[str, str]]:
        lines = [(record.levelname, record.getMessage()) for record in self._caplog.records]
        self._caplog.clear()
        return lines


def test_a_node_that_is_not_listed_yet_is_no_problem(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(caplog)
    assert scene.take() is None
    assert scene.take(Replace(Service, ()), Replace(EndpointSlice, ())) is None
    assert scene.take(Replace(Node, (NODE,))) is None
    assert (scene.said(), scene.watch.reason, scene.missing) == ([], "", [])


def test_a_node_of_another_name_is_said_again_and_again_until_it_appears(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(caplog)
    assert scene.take(Replace(Node, ())) == 60.0
    ((level, text),) = scene.said()
    assert level == "WARNING"
    assert text.startswith(
        'Node "node-1" not found: zone, addresses and podCIDRs are unknown, and /healthz answers 503; '
    )
    assert NAME in text
    assert "\n" not in text
    assert (scene.watch.reason, scene.missing) == (text, [True])
    scene.now = 59.0
    assert scene.take(Upsert(Service("ns", "web", ("10.96.0.1",), ()))) == 1.0
    assert scene.said() == []
    scene.now = 60.0
    assert scene.take() == 120.0
    assert scene.said() == [("WARNING", text)]
    assert scene.take(Upsert(NODE)) is None
    assert scene.said() == [("INFO", 'Node "node-1" exists')]
    assert (scene.watch.reason, scene.missing) == ("", [True, False])


def test_a_node_that_is_deleted_while_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(caplog)
    scene.take(Replace(Node, (NODE,)))
    assert scene.take(Upsert(Node("node-1", being_deleted=True))) is None
    assert scene.said() == [], "it still exists"
    assert scene.take(Delete(Node, "", "node-1")) == 60.0
    ((level, text),) = scene.said()
    what = 'Node "node-1" was deleted: /healthz answers 503; kproxy keeps its last known zone, addresses and podCIDRs'
    assert (level, text) == ("WARNING", what)
    scene.take(Upsert(NODE))
    scene.said()
    assert scene.take(Delete(Node, "", "node-1")) == 60.0, "the pauses begin anew"
    assert scene.said() == [("WARNING", text)]


def test_pod_cidrs_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(caplog, needs_pod_cidrs=True)
    assert scene.take(Replace(Node, ())) == 60.0
    ((_, text),) = scene.said()
    assert "nothing is programmed until it exists and has podCIDRs (detectLocalMode: NodeCIDR)" in text
    assert NAME in text
    assert scene.take(Upsert(NODE)) == 60.0
    ((level, text),) = scene.said()
    assert level == "WARNING"
    expected = 'Node "node-1" has no podCIDRs, which detectLocalMode: NodeCIDR needs: nothing is programmed; '
    assert text.startswith(expected)
    assert (scene.watch.reason, scene.missing) == (text, [True, False])
    scene.now = 60.0
    assert scene.take() == 120.0
    assert scene.said() == [("WARNING", text)]
    assert scene.take(Upsert(WITH_CIDRS)) is None
    assert scene.said() == [("INFO", 'Node "node-1" exists and has podCIDRs')]
    scene.take(Delete(Node, "", "node-1"))
    assert "nothing is programmed" not in scene.said()[0][1], "what its Node said of it stays true"
    scene.take(Upsert(NODE))
    assert "traffic of this node's pods is not recognized" in scene.said()[0][1]


def test_files_need_no_node_but_where_pod_cidrs_come_from_it(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(caplog, required=False)
    assert scene.take(Replace(Node, ())) is None
    assert scene.take(Upsert(NODE), Delete(Node, "", "node-1")) is None
    assert (scene.said(), scene.watch.reason, scene.missing) == ([], "", [])
    scene = Scene(caplog, required=False, needs_pod_cidrs=True)
    assert scene.take(Replace(Node, ())) == 60.0
    assert len(scene.said()) == 1


@pytest.mark.parametrize("listed", [True, False])
def test_the_reconciler_reminds_without_messages(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    """Whether it is ready or still waits for other kinds to be listed."""
    monkeypatch.setattr("kproxy.model.log_throttle.FIRST_PAUSE", 0.001)
    reminded = threading.Semaphore(0)

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if 'Node "node-1" not found' in record.getMessage():
                reminded.release()

    handler = Counting()
    logging.getLogger("kproxy.sync.node_monitor").addHandler(handler)
    watch = NodeMonitor("node-1", required=True, needs_pod_cidrs=False)
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    reconciler = Reconciler(
        Store("node-1"),
        {},
        make_schedule=lambda: Schedule(min_interval=1.0, max_retry=1.0),
        clock=time.monotonic,
        monitor=watch.check,
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
