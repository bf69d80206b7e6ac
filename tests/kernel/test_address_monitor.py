"""Notifications about added and removed addresses from the kernel."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from kproxy.host.interfaces import AddressMonitor
from tests.lab.namespace import Namespace

HANG_GUARD = 30.0
GRACE_PERIOD = 0.1
"""Seconds in which an unexpected event would happen."""
ADDRESSES = {"IPv4": "192.0.2.1/24", "IPv6": "2001:db8::1/64"}


@pytest.fixture
def node(namespace: Namespace) -> Namespace:
    """A namespace with one interface without addresses."""
    namespace.sysctl(ipv6__conf__default__addr_gen_mode=1)
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0-peer"])
    namespace.run(["ip", "link", "set", "eth0", "up"])
    return namespace


def address(node: Namespace, verb: str, value: str) -> None:
    node.run(["ip", "address", verb, value, "dev", "eth0", *(["nodad"] if ":" in value and verb == "add" else [])])


class Notifications:
    """An address monitor in a namespace, and its callbacks."""

    def __init__(self, node: Namespace) -> None:
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.monitor = node.call(lambda: AddressMonitor(self._note))

    def _note(self) -> None:
        self.calls.put(threading.current_thread().name)

    def take(self) -> None:
        """Wait for a callback."""
        self.calls.get(timeout=HANG_GUARD)

    def discard(self, change: Callable[[], None]) -> None:
        """Make a change and discard its callback and all earlier ones."""
        change()
        self.take()
        while not self.calls.empty():
            self.take()


@pytest.fixture
def notifications(node: Namespace) -> Iterator[Notifications]:
    found = Notifications(node)
    found.monitor.start()
    yield found
    found.monitor.stop(HANG_GUARD)


@pytest.mark.parametrize("value", ADDRESSES.values(), ids=ADDRESSES)
def test_added_and_removed_addresses_are_notified(node: Namespace, notifications: Notifications, value: str) -> None:
    address(node, "add", value)
    notifications.take()
    # A change may send several notifications, for IPv6 one more after duplicate address detection. Discard them all.
    notifications.discard(lambda: address(node, "add", "192.0.2.200/24"))
    address(node, "del", value)
    notifications.take()


def test_change_before_start_is_not_missed(node: Namespace) -> None:
    notifications = Notifications(node)
    address(node, "add", ADDRESSES["IPv4"])
    assert notifications.calls.empty()
    notifications.monitor.start()
    notifications.take()
    notifications.monitor.stop(HANG_GUARD)


def test_simultaneous_changes_are_one_callback(node: Namespace) -> None:
    notifications = Notifications(node)
    for number in range(1, 51):
        address(node, "add", f"192.0.2.{number}/32")
    notifications.monitor.start()
    notifications.take()
    notifications.monitor.stop(HANG_GUARD)
    assert notifications.calls.empty()


def test_lost_notifications_count_as_a_change(node: Namespace) -> None:
    notifications = Notifications(node)
    # More than the socket buffer holds, so the kernel drops the rest and reports ENOBUFS.
    batch = "".join(f"address {verb} 192.0.2.1/32 dev eth0\n" for _ in range(2000) for verb in ("add", "del"))
    node.run(["ip", "-batch", "-"], batch)
    notifications.monitor.start()
    notifications.take()
    address(node, "add", ADDRESSES["IPv4"])
    notifications.take()
    notifications.monitor.stop(HANG_GUARD)


def test_changes_of_links_and_routes_are_ignored(node: Namespace) -> None:
    notifications = Notifications(node)
    notifications.monitor.start()
    node.run(["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1-peer"])
    node.run(["ip", "route", "add", "198.51.100.0/24", "dev", "eth0"])
    node.run(["ip", "link", "del", "eth1"])
    notifications.monitor.stop(HANG_GUARD)
    assert notifications.calls.empty()


def test_no_callback_after_stop(node: Namespace) -> None:
    notifications = Notifications(node)
    notifications.monitor.start()
    address(node, "add", ADDRESSES["IPv4"])
    notifications.take()
    notifications.monitor.stop(HANG_GUARD)
    while not notifications.calls.empty():
        notifications.take()
    address(node, "add", ADDRESSES["IPv6"])
    assert notifications.calls.empty()
    assert "address-monitor" not in {thread.name for thread in threading.enumerate()}


def test_stop_waits_for_a_running_callback(node: Namespace) -> None:
    entered, stop_called = threading.Event(), threading.Event()
    stopped_meanwhile: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def on_change() -> None:
        entered.set()
        assert stop_called.wait(HANG_GUARD)
        stopping.join(GRACE_PERIOD)
        stopped_meanwhile.put(not stopping.is_alive())

    monitor = node.call(lambda: AddressMonitor(on_change))
    stopping = threading.Thread(target=monitor.stop, args=(HANG_GUARD,))
    monitor.start()
    address(node, "add", ADDRESSES["IPv4"])
    assert entered.wait(HANG_GUARD)
    stopping.start()
    stop_called.set()
    stopping.join(HANG_GUARD)
    assert not stopping.is_alive()
    assert stopped_meanwhile.get(timeout=HANG_GUARD) is False


def test_stop_without_start_closes_the_monitor(node: Namespace) -> None:
    notifications = Notifications(node)
    address(node, "add", ADDRESSES["IPv4"])
    notifications.monitor.stop(HANG_GUARD)
    assert notifications.calls.empty()


def test_unexpected_error_makes_the_monitor_subscribe_again(
    node: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.01)
    calls: queue.SimpleQueue[int] = queue.SimpleQueue()
    numbers = itertools.count()

    def on_change() -> None:
        calls.put(number := next(numbers))
        if number < 2:  # also fails once while the monitor subscribes again
            raise MemoryError

    monitor = node.call(lambda: AddressMonitor(on_change))
    node.call(monitor.start)
    address(node, "add", ADDRESSES["IPv4"])
    for number in range(3):
        assert calls.get(timeout=HANG_GUARD) == number
    address(node, "del", ADDRESSES["IPv4"])
    assert calls.get(timeout=HANG_GUARD) == 3
    monitor.stop(HANG_GUARD)
    assert [record.message for record in caplog.records] == ["address-monitor: unexpected MemoryError(); trying again"]
