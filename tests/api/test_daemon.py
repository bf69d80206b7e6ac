"""`kproxy run` on a node's real kernel, following an API server over real HTTP through everything that breaks."""

from __future__ import annotations

import signal
import time

import pytest

from tests.api.conftest import Cluster
from tests.api.node import ProxiedNode
from tests.apiserver.objects import endpoint_slice, node, service
from tests.lab.waiting import HANG_GUARD, wait_until


def populate(cluster: Cluster) -> None:
    cluster.create(node("node-1"))
    for number in range(1, 4):
        cluster.create(service(f"web-{number}", f"10.96.7.{number}"))
        cluster.create(endpoint_slice(f"web-{number}-x", f"web-{number}", [f"10.244.1.{number}", f"10.244.2.{number}"]))


def test_programs_what_is_there_and_follows_it(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    cluster.create(service("new", "10.96.7.9"))
    cluster.create(endpoint_slice("new-x", "new", ["10.244.1.9"]))
    proxied.settle()
    cluster.update(endpoint_slice("new-x", "new", ["10.244.1.10", "10.244.1.11"]))
    proxied.settle()
    cluster.delete(service("web-1", "10.96.7.1"))
    cluster.delete(endpoint_slice("web-2-x", "web-2", []))
    proxied.settle()


def test_a_rollout_in_many_small_steps(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    for step in range(30):
        cluster.update(endpoint_slice("web-1-x", "web-1", [f"10.244.1.{step + other}" for other in range(1, 5)]))
    proxied.settle()


def test_a_lost_connection_loses_nothing_and_rewrites_nothing(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    before = proxied.commits()
    cluster.update(endpoint_slice("web-1-x", "web-1", ["10.244.1.50"]))
    proxied.settle()
    one_change = proxied.commits() - before

    proxied.relay.cut()
    cluster.update(endpoint_slice("web-1-x", "web-1", ["10.244.1.51"]))
    proxied.settle()
    assert proxied.commits() - before == 2 * one_change


def test_changes_while_the_server_cannot_be_reached(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    held = proxied.rules()
    proxied.relay.refuse()
    cluster.delete(service("web-1", "10.96.7.1"))
    cluster.create(service("new", "10.96.7.9"))
    assert proxied.rules() == held
    proxied.relay.allow()
    proxied.settle()


def test_history_that_is_gone_is_a_diff(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    proxied.relay.refuse()
    before = proxied.commits()
    cluster.update(endpoint_slice("web-2-x", "web-2", ["10.244.1.60"]))
    cluster.delete(service("web-3", "10.96.7.3"))
    cluster.compact()
    proxied.relay.allow()
    proxied.settle()
    # web-2 rewritten in nat; web-3 out of nat, and nothing of it in filter: two Services at most, no full pass.
    assert proxied.commits() - before <= 4


def test_a_restart_of_the_server(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    cluster.stop()
    cluster.start()
    cluster.create(service("new", "10.96.7.9"))
    proxied.settle()


def test_silence_ends_with_everything_in_place(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.start()
    proxied.settle()
    proxied.relay.stall()
    cluster.update(endpoint_slice("web-1-x", "web-1", ["10.244.1.70"]))
    cluster.delete(service("web-2", "10.96.7.2"))
    proxied.relay.resume()
    proxied.settle()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_ends_at_once_and_leaves_the_rules(cluster: Cluster, proxied: ProxiedNode, number: signal.Signals) -> None:
    populate(cluster)
    process = proxied.start()
    proxied.settle()
    code = proxied.stop(process, number)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    assert proxied.rules() == proxied.wanted()

    before, said = proxied.commits(), proxied.log().count(": synced ")
    proxied.start()
    wait_until(lambda: proxied.log().count(": synced ") == said + 2, "the first sync of the second start")
    assert proxied.commits() == before, "a restart rewrote rules that were right"


def test_catches_up_with_what_happened_while_it_was_down(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    process = proxied.start()
    proxied.settle()
    proxied.stop(process)
    cluster.delete(service("web-1", "10.96.7.1"))
    cluster.update(endpoint_slice("web-2-x", "web-2", ["10.244.1.80"]))
    proxied.start()
    proxied.settle()


def test_touches_nothing_before_it_knows_the_cluster(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    process = proxied.start()
    proxied.settle()
    proxied.stop(process)
    held = proxied.rules()
    proxied.relay.refuse()
    process = proxied.start()
    wait_until(lambda: "Connection refused" in proxied.log(), "a complaint that there is no connection")
    assert proxied.stop(process) == 0
    assert proxied.rules() == held


def test_ends_at_once_while_a_list_hangs(cluster: Cluster, proxied: ProxiedNode) -> None:
    populate(cluster)
    proxied.relay.stall(new=True)
    process = proxied.start()
    wait_until(lambda: proxied.relay.connections >= 3, "requests for three lists")
    began = time.monotonic()
    assert proxied.stop(process) == 0
    assert time.monotonic() - began < HANG_GUARD / 6
