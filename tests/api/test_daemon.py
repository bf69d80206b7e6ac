"""`kproxy run` on a real kernel, watching an API server over real HTTP while connections and servers fail."""

from __future__ import annotations

import signal

import pytest

from tests.api.conftest import Cluster
from tests.api.node import NodeDaemon
from tests.apiserver.objects import endpoint_slice, node, service
from tests.lab.waiting import wait_until


def populate(cluster: Cluster) -> None:
    cluster.create(node("node-1"))
    for number in range(1, 4):
        cluster.create(service(f"web-{number}", f"10.96.7.{number}"))
        cluster.create(endpoint_slice(f"web-{number}-x", f"web-{number}", [f"10.244.1.{number}", f"10.244.2.{number}"]))


def test_rules_follow_the_cluster(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    cluster.create(service("new", "10.96.7.9"))
    cluster.create(endpoint_slice("new-x", "new", ["10.244.1.9"]))
    daemon.settle()
    cluster.update(endpoint_slice("new-x", "new", ["10.244.1.10", "10.244.1.11"]))
    daemon.settle()
    cluster.delete(service("web-1", "10.96.7.1"))
    cluster.delete(endpoint_slice("web-2-x", "web-2", []))
    daemon.settle()


def test_rollout_in_many_small_steps(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    for step in range(30):
        cluster.update(endpoint_slice("web-1-x", "web-1", [f"10.244.1.{step + other}" for other in range(1, 5)]))
    daemon.settle()


def test_broken_connection_loses_no_change_and_rewrites_nothing(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    before = daemon.generation()
    cluster.update(endpoint_slice("web-1-x", "web-1", ["10.244.1.50"]))
    daemon.settle()
    one_change = daemon.generation() - before

    daemon.relay.cut()
    cluster.update(endpoint_slice("web-1-x", "web-1", ["10.244.1.51"]))
    daemon.settle()
    assert daemon.generation() - before == 2 * one_change


def test_changes_while_the_server_is_unreachable(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    rules = daemon.rules()
    daemon.relay.refuse()
    cluster.delete(service("web-1", "10.96.7.1"))
    cluster.create(service("new", "10.96.7.9"))
    assert daemon.rules() == rules
    daemon.relay.allow()
    daemon.settle()


def test_compacted_history_leads_to_a_diff_not_a_full_sync(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    daemon.relay.refuse()
    before = daemon.generation()
    cluster.update(endpoint_slice("web-2-x", "web-2", ["10.244.1.60"]))
    cluster.delete(service("web-3", "10.96.7.3"))
    cluster.compact()
    daemon.relay.allow()
    daemon.settle()
    # web-2 is rewritten in nat, web-3 is removed from nat and was never in filter: two Services at most.
    assert daemon.generation() - before <= 4


def test_server_restart(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    cluster.stop()
    cluster.start()
    cluster.create(service("new", "10.96.7.9"))
    daemon.settle()


def test_stalled_connection_resumes_without_losing_changes(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    daemon.start()
    daemon.settle()
    daemon.relay.stall()
    cluster.update(endpoint_slice("web-1-x", "web-1", ["10.244.1.70"]))
    cluster.delete(service("web-2", "10.96.7.2"))
    daemon.relay.resume()
    daemon.settle()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_exits_at_once_and_leaves_the_rules(cluster: Cluster, daemon: NodeDaemon, number: signal.Signals) -> None:
    populate(cluster)
    process = daemon.start()
    daemon.settle()
    code = daemon.stop(process, number)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else 0)
    assert daemon.rules() == daemon.expected_rules()

    before, syncs = daemon.generation(), daemon.log().count(": synced ")
    daemon.start()
    wait_until(lambda: daemon.log().count(": synced ") == syncs + 2, "the first sync of the second start")
    assert daemon.generation() == before, "the restart rewrote rules that were correct"


def test_catches_up_with_changes_made_while_it_was_down(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    process = daemon.start()
    daemon.settle()
    daemon.stop(process)
    cluster.delete(service("web-1", "10.96.7.1"))
    cluster.update(endpoint_slice("web-2-x", "web-2", ["10.244.1.80"]))
    daemon.start()
    daemon.settle()


def test_rules_are_unchanged_until_the_cluster_is_listed(cluster: Cluster, daemon: NodeDaemon) -> None:
    populate(cluster)
    process = daemon.start()
    daemon.settle()
    daemon.stop(process)
    rules = daemon.rules()
    daemon.relay.refuse()
    process = daemon.start()
    wait_until(lambda: "Connection refused" in daemon.log(), "a log line about the connection error")
    assert daemon.stop(process) == 0
    assert daemon.rules() == rules
