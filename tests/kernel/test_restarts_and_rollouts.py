"""No connection notices that kproxy is replaced, or that what is behind the Services is: a stream of them runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kproxy.nftables.probe import TABLE as PROBE
from tests.lab.cluster import SERVICES, Cluster
from tests.lab.connection_stream import Stream
from tests.lab.modes import TABLE, NftablesRules, flag
from tests.lab.node_pods import VANISHED, vanish
from tests.lab.restart import MortalDaemon
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.transaction_monitor import Commits
from tests.lab.waiting import wait_until

REPLICAS = 5
QUICK = "--iptables-min-sync-period=50ms"
"""Many small syncs, in the middle of many changes; the default of a second would batch them all."""

HALF = 18
"""Pods in each of two sets. One for the other is over 1,200 rules, so that each family takes two transactions."""

TRANSACTIONS = {"iptables": 4, "nftables": 2}
"""After how many of them a daemon is killed: nftables mode takes one for each family."""


@pytest.fixture(params=TRANSACTIONS)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> Cluster:
    """Twenty Services, each with its first five pods running and ready."""
    found = Cluster(lab, servers, tmp_path / "objects", pods=2 * REPLICAS, mode=mode)
    for service in range(SERVICES):
        for number in range(REPLICAS):
            found.start(service, number)
        found.write(service, range(REPLICAS))
    return found


@pytest.fixture
def large_cluster(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> Cluster:
    """Twenty Services, each with two sets of pods running, the first of them ready."""
    found = Cluster(lab, servers, tmp_path / "objects", pods=2 * HALF, mode=mode)
    for service in range(SERVICES):
        for number in range(2 * HALF):
            found.start(service, number)
        found.write(service, range(HALF))
    return found


@pytest.fixture
def commits(lab: Lab, mode: str) -> Iterator[Commits]:
    """What is written to the node's rules."""
    if mode == "iptables" and "nf_tables" not in lab.node.namespace.run(["iptables", "--version"]).stdout:
        pytest.skip("iptables-legacy is in use, of whose changes the kernel tells nobody")
    with Commits(lab.node.namespace, without=PROBE) as found:
        yield found


@pytest.fixture
def daemon(lab: Lab, tmp_path: Path, mode: str) -> Callable[..., MortalDaemon]:
    """Makes a daemon, with further flags."""

    def make(*flags: str) -> MortalDaemon:
        return MortalDaemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", flag(mode), *flags)

    return make


Daemons = Callable[..., MortalDaemon]


def changes(commits: Commits, mode: str) -> Sequence[object]:
    """Return what was changed since the last call.

    A table of nftables mode that is taken over gets the rules that it has anew, so there only elements count.
    """
    made = commits.new()
    return made if mode == "iptables" else [each for each in made if each.elements]


def test_ending_and_starting_changes_nothing(cluster: Cluster, commits: Commits, daemon: Daemons, mode: str) -> None:
    with daemon() as first:
        first.wait_in_force()
        rules = cluster.rules()
        assert changes(commits, mode)
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
                    assert changes(commits, mode) == []
                    assert cluster.rules() == rules
                    stream.mark(ending)
                    assert next_one.terminate() == 0
                stream.take()
                assert cluster.rules() == rules
            assert changes(commits, mode) == []
    assert stream.complaints() == ""


@pytest.mark.parametrize("mode", ["iptables"], indirect=True)
def test_a_restart_writes_only_the_rules_that_have_changed_meanwhile(
    cluster: Cluster, commits: Commits, daemon: Daemons
) -> None:
    with daemon() as first:
        first.wait_in_force()
        rules = cluster.rules()
        commits.new()
        with Stream(cluster.targets()) as stream:
            change_behind_its_back(cluster, stream, first, daemon)
            written = {chain for transaction in commits.new() for chain in transaction.chains}
            differing = set(rules.splitlines()) ^ set(cluster.rules().splitlines())
            assert written == {line.split()[1] for line in differing if line.startswith("-A ")}
    assert stream.complaints() == ""


@pytest.mark.parametrize("mode", ["nftables"], indirect=True)
def test_a_restart_writes_only_the_elements_that_have_changed_meanwhile(
    lab: Lab, cluster: Cluster, commits: Commits, daemon: Daemons
) -> None:
    rules = NftablesRules(lab.node.namespace)
    with daemon() as first:
        first.wait_in_force()
        before = rules.elements()
        commits.new()
        with Stream(cluster.targets()) as stream:
            change_behind_its_back(cluster, stream, first, daemon)
            written = Counter[str]()
            for transaction in commits.new():
                written.update(dict(transaction.elements))
            assert written == Counter(f"{TABLE} {name}" for _, name, _ in before ^ rules.elements())
            assert written
    assert stream.complaints() == ""


def change_behind_its_back(cluster: Cluster, stream: Stream, first: MortalDaemon, daemon: Daemons) -> None:
    """Add a pod while no kproxy runs, start one, and end it when the pod answers."""
    stream.take()
    first.kill()
    stream.mark("kill -9")
    cluster.start(0, REPLICAS)
    cluster.write(0, range(REPLICAS + 1))
    with daemon() as second:
        stream.mark("a start")
        second.wait_in_force()
        assert cluster.sockets([(0, REPLICAS)]) <= cluster.destinations()
        wait_until(lambda: f"demo/web-00/{REPLICAS}" in stream.take(), "the new pod answers")


def test_being_killed_amid_changes_loses_nothing(
    large_cluster: Cluster, commits: Commits, daemon: Daemons, mode: str
) -> None:
    cluster = large_cluster
    sets = [range(HALF), range(HALF, 2 * HALF)]
    with daemon() as first:
        first.wait_in_force()
    with Stream(cluster.targets()) as stream:
        stream.take()
        for last in range(1, TRANSACTIONS[mode] + 1):
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


def test_a_rolling_update_loses_nothing(cluster: Cluster, daemon: Daemons) -> None:
    with daemon(QUICK) as running:
        running.wait_in_force()
        with Stream(cluster.targets()) as stream:
            for old in range(REPLICAS):
                stream.mark(f"pods {old} began to be replaced")
                replace(cluster, stream, old)
            answered = stream.take(8)
        assert running.is_up()
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


def test_pods_that_vanish_take_only_their_own_connections_along(cluster: Cluster, daemon: Daemons) -> None:
    with daemon(QUICK) as running:
        running.wait_in_force()
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
        assert running.is_up()
    assert stream.failures() == lost, stream.complaints()
    assert {int(pod.rpartition("/")[2]) for pod in answered} == {REPLICAS - 1}
