"""Notices of addresses that come and go, from the real kernel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from kproxy.host.interfaces import AddressMonitor
from tests.lab.namespace import Namespace

HANG_GUARD = 30.0
NOT_YET = 0.1
"""Seconds in which something that would be wrong has the time to happen."""
ADDRESSES = {"IPv4": "192.0.2.1/24", "IPv6": "2001:db8::1/64"}


@pytest.fixture
def node(namespace: Namespace) -> Namespace:
    """A namespace with one interface that nothing but the test gives addresses to."""
    namespace.sysctl(ipv6__conf__default__addr_gen_mode=1)
    namespace.run(["ip", "link", "set", "lo", "up"])
    namespace.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0-peer"])
    namespace.run(["ip", "link", "set", "eth0", "up"])
    return namespace


def address(node: Namespace, verb: str, value: str) -> None:
    node.run(["ip", "address", verb, value, "dev", "eth0", *(["nodad"] if ":" in value and verb == "add" else [])])


class Notices:
    """A started monitor of a namespace, and its calls."""

    def __init__(self, node: Namespace) -> None:
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.monitor = node.call(lambda: AddressMonitor(self._note))

    def _note(self) -> None:
        self.calls.put(threading.current_thread().name)

    def take(self) -> None:
        """Wait for a call."""
        self.calls.get(timeout=HANG_GUARD)

    def forget(self, settle: Callable[[], None]) -> None:
        """Take one call for a change that is made now, and all before it."""
        settle()
        self.take()
        while not self.calls.empty():
            self.take()


@pytest.fixture
def notices(node: Namespace) -> Iterator[Notices]:
    found = Notices(node)
    found.monitor.start()
    yield found
    found.monitor.stop()


@pytest.mark.parametrize("value", ADDRESSES.values(), ids=ADDRESSES)
def test_an_address_that_comes_and_one_that_goes(node: Namespace, notices: Notices, value: str) -> None:
    address(node, "add", value)
    notices.take()
    # One change may bring several notices (for IPv6, the end of its trial); the next address is another one.
    notices.forget(lambda: address(node, "add", "192.0.2.200/24"))
    address(node, "del", value)
    notices.take()


def test_a_change_between_making_and_starting_is_not_missed(node: Namespace) -> None:
    notices = Notices(node)
    address(node, "add", ADDRESSES["IPv4"])
    assert notices.calls.empty()
    notices.monitor.start()
    notices.take()
    notices.monitor.stop()


def test_changes_that_come_together_are_one_call(node: Namespace) -> None:
    notices = Notices(node)
    for number in range(1, 51):
        address(node, "add", f"192.0.2.{number}/32")
    notices.monitor.start()
    notices.take()
    notices.monitor.stop()
    assert notices.calls.empty()


def test_lost_notices_count_as_a_change(node: Namespace) -> None:
    notices = Notices(node)
    # Far more than the socket holds, so that the kernel drops the rest and says ENOBUFS.
    batch = "".join(f"address {verb} 192.0.2.1/32 dev eth0\n" for _ in range(2000) for verb in ("add", "del"))
    node.run(["ip", "-batch", "-"], batch)
    notices.monitor.start()
    notices.take()
    address(node, "add", ADDRESSES["IPv4"])
    notices.take()
    notices.monitor.stop()


def test_links_and_routes_are_none_of_its_business(node: Namespace) -> None:
    notices = Notices(node)
    notices.monitor.start()
    node.run(["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1-peer"])
    node.run(["ip", "route", "add", "198.51.100.0/24", "dev", "eth0"])
    node.run(["ip", "link", "del", "eth1"])
    notices.monitor.stop()
    assert notices.calls.empty()


def test_no_call_after_stop(node: Namespace) -> None:
    notices = Notices(node)
    notices.monitor.start()
    address(node, "add", ADDRESSES["IPv4"])
    notices.take()
    notices.monitor.stop()
    while not notices.calls.empty():
        notices.take()
    address(node, "add", ADDRESSES["IPv6"])
    assert notices.calls.empty()
    assert "address-monitor" not in {thread.name for thread in threading.enumerate()}


def test_stop_waits_for_a_call_under_way(node: Namespace) -> None:
    entered, stop_called = threading.Event(), threading.Event()
    stopped_meanwhile: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def changed() -> None:
        entered.set()
        assert stop_called.wait(HANG_GUARD)
        stopping.join(NOT_YET)
        stopped_meanwhile.put(not stopping.is_alive())

    monitor = node.call(lambda: AddressMonitor(changed))
    stopping = threading.Thread(target=monitor.stop)
    monitor.start()
    address(node, "add", ADDRESSES["IPv4"])
    assert entered.wait(HANG_GUARD)
    stopping.start()
    stop_called.set()
    stopping.join(HANG_GUARD)
    assert not stopping.is_alive()
    assert stopped_meanwhile.get(timeout=HANG_GUARD) is False


def test_stop_without_start_frees_it(node: Namespace) -> None:
    notices = Notices(node)
    address(node, "add", ADDRESSES["IPv4"])
    notices.monitor.stop()
    assert notices.calls.empty()
