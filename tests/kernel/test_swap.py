"""No connection notices that kproxy is replaced, or that what is behind the Services is: a stream of them runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import SERVICES, Cluster
from tests.lab.commits import Commits
from tests.lab.crowd import VANISHED, vanish
from tests.lab.load import Stream
from tests.lab.restart import MortalDaemon
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until

REPLICAS = 5
QUICK = "--iptables-min-sync-period=50ms"
"""Many small syncs, in the middle of many changes; the default of a second would batch them all."""

HALF = 10
"""Pods in each of two sets. One for the other is over 600 rules, so that each family takes three transactions."""


@pytest.fixture
def cluster(lab: Lab, servers: Servers, tmp_path: Path) -> Cluster:
    """Twenty Services, each with its first five pods running and ready."""
    found = Cluster(lab, servers, tmp_path / "objects", pods=2 * REPLICAS)
    for service in range(SERVICES):
        for number in range(REPLICAS):
            found.start(service, number)
        found.write(service, range(REPLICAS))
    return found


@pytest.fixture
def commits(lab: Lab) -> Iterator[Commits]:
    """What is written to the node's rules."""
    if "nf_tables" not in lab.node.namespace.run(["iptables", "--version"]).stdout:
        pytest.skip("iptables-legacy is in use, of whose changes the kernel tells nobody")
    with Commits(lab.node.namespace) as found:
        yield found


def test_ending_and_starting_changes_nothing(lab: Lab, cluster: Cluster, commits: Commits, tmp_path: Path) -> None:
    def daemon() -> MortalDaemon:
        return MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log")

    with daemon() as first:
        first.wait_in_force()
        rules = cluster.rules()
        commits.new()
        with Stream(cluster.targets()) as stream:
            stream.take()
            stream.mark("kill -9")
            first.kill()
            stream.take()
            for ending in ("SIGTERM", "the end"):
                with daemon() as next_one:
                    stream.mark("a start")
                    next_one.wait_in_force()
                    stream.take()
                    assert commits.new() == []
                    assert cluster.rules() == rules
                    stream.mark(ending)
                    assert next_one.terminate() == 0
                stream.take()
                assert cluster.rules() == rules
            assert commits.new() == []
    assert stream.complaints() == ""


def test_a_restart_writes_only_what_has_changed_meanwhile(
    lab: Lab, cluster: Cluster, commits: Commits, tmp_path: Path
) -> None:
    with MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log") as first:
        first.wait_in_force()
        rules = cluster.rules()
        commits.new()
        with Stream(cluster.targets()) as stream:
            stream.take()
            first.kill()
            stream.mark("kill -9")
            cluster.start(0, REPLICAS)
            cluster.write(0, range(REPLICAS + 1))
            with MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log") as second:
                stream.mark("a start")
                second.wait_in_force()
                assert cluster.sockets([(0, REPLICAS)]) <= cluster.destinations()
                wait_until(lambda: f"demo/web-00/{REPLICAS}" in stream.take(), "the new pod answers")
            written = {chain for transaction in commits.new() for chain in transaction.chains}
            differing = set(rules.splitlines()) ^ set(cluster.rules().splitlines())
            assert written == {line.split()[1] for line in differing if line.startswith("-A ")}
    assert stream.complaints() == ""


def test_being_killed_amid_changes_loses_nothing(lab: Lab, servers: Servers, commits: Commits, tmp_path: Path) -> None:
    cluster = Cluster(lab, servers, tmp_path / "objects", pods=2 * HALF)
    sets = [range(HALF), range(HALF, 2 * HALF)]
    for service in range(SERVICES):
        for number in range(2 * HALF):
            cluster.start(service, number)
        cluster.write(service, sets[0])

    def daemon() -> MortalDaemon:
        return MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log")

    with daemon() as first:
        first.wait_in_force()
    with Stream(cluster.targets()) as stream:
        stream.take()
        for last in range(1, 6):
            wanted = sets[last % 2]
            for service in range(SERVICES):
                cluster.write(service, wanted)
            commits.new()
            with daemon() as victim:
                commits.wait_for(last)
                victim.kill()
                stream.mark(f"kill -9 after {last} transactions")
                stream.take()
            with daemon() as survivor:
                stream.mark("the next start")
                survivor.wait_in_force()
                assert cluster.destinations() == cluster.sockets((s, n) for s in range(SERVICES) for n in wanted)
    assert stream.complaints() == ""


def test_a_rolling_update_loses_nothing(lab: Lab, cluster: Cluster, tmp_path: Path) -> None:
    with MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", QUICK) as daemon:
        daemon.wait_in_force()
        with Stream(cluster.targets()) as stream:
            for old in range(REPLICAS):
                stream.mark(f"pods {old} began to be replaced")
                replace(cluster, stream, old)
            answered = stream.take(8)
        assert daemon.is_up()
    assert stream.complaints() == ""
    assert {int(pod.rpartition("/")[2]) for pod in answered} == set(range(REPLICAS, 2 * REPLICAS))


def replace(cluster: Cluster, stream: Stream, old: int) -> None:
    """Replace one pod of every Service as a Deployment does: start, mark, wait for the rules, stop, remove."""
    new, others = old + REPLICAS, range(old + 1, old + REPLICAS)
    for service in range(SERVICES):
        cluster.start(service, new)
        cluster.write(service, [old, *others, new])
    started = cluster.sockets((service, new) for service in range(SERVICES))
    wait_until(lambda: started <= cluster.destinations(), f"the rules send to pods {new}")
    for service in range(SERVICES):
        cluster.write(service, [*others, new], leaving=[old])
    leaving = cluster.sockets((service, old) for service in range(SERVICES))
    wait_until(lambda: not leaving & cluster.destinations(), f"the rules no longer send to pods {old}")
    stream.settle()
    for service in range(SERVICES):
        cluster.stop(service, old)
        cluster.write(service, [*others, new])


def test_pods_that_vanish_take_only_their_own_connections_along(
    lab: Lab, servers: Servers, cluster: Cluster, tmp_path: Path
) -> None:
    with MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", QUICK) as daemon:
        daemon.wait_in_force()
        with Stream(cluster.targets()) as stream:
            stream.take()
            gone = [(service, number) for number in range(REPLICAS - 1) for service in range(SERVICES)]
            for service, number in gone:
                stream.mark(f"pod {number} of web-{service:02} vanished")
                vanish(cluster.pod(service, number))
                cluster.write(service, range(number + 1, REPLICAS))
            sockets = cluster.sockets(gone)
            wait_until(lambda: not sockets & cluster.destinations(), "the rules send to none of the pods that are gone")
            stream.settle()
            lost = stream.failures()
            assert stream.told([attempt for attempt in lost if attempt.outcome != VANISHED]) == ""
            stream.mark("the rules followed")
            answered = stream.take(2)
        assert daemon.is_up()
    assert stream.failures() == lost, stream.complaints()
    assert {int(pod.rpartition("/")[2]) for pod in answered} == {REPLICAS - 1}
