"""No connection fails while kproxy restarts or the endpoints of Services are replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kproxy.nftables.probe import PROBE_TABLE
from tests.lab.cluster import SERVICES, LabCluster
from tests.lab.connection_stream import ConnectionStream
from tests.lab.modes import TABLE, NftablesRules, mode_flag
from tests.lab.node_pods import UNREACHABLE, make_unreachable
from tests.lab.proxy import Daemon
from tests.lab.servers import Servers
from tests.lab.topology import Lab
from tests.lab.transaction_monitor import TransactionMonitor
from tests.lab.waiting import wait_until

REPLICAS = 5
SHORT_SYNC_PERIOD = "--iptables-min-sync-period=50ms"
"""Many small syncs during the changes. The default of 1 s would batch all changes."""

SET_SIZE = 18
"""Pods in each of two sets. Replacing one set by the other needs over 1200 rules, so two transactions per family."""

TRANSACTIONS = {"iptables": 4, "nftables": 2}
"""Transactions of one change in both families. A daemon is killed after each of them."""


@pytest.fixture(params=TRANSACTIONS)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> LabCluster:
    """20 Services. The first five pods of each are running and ready."""
    found = LabCluster(lab, servers, tmp_path / "objects", pods=2 * REPLICAS, mode=mode)
    for service in range(SERVICES):
        for number in range(REPLICAS):
            found.start(service, number)
        found.write(service, range(REPLICAS))
    return found


@pytest.fixture
def large_cluster(lab: Lab, servers: Servers, tmp_path: Path, mode: str) -> LabCluster:
    """20 Services. Two sets of pods of each are running, the first set is ready."""
    found = LabCluster(lab, servers, tmp_path / "objects", pods=2 * SET_SIZE, mode=mode)
    for service in range(SERVICES):
        for number in range(2 * SET_SIZE):
            found.start(service, number)
        found.write(service, range(SET_SIZE))
    return found


@pytest.fixture
def commits(lab: Lab, mode: str) -> Iterator[TransactionMonitor]:
    """The transactions on the node's rules."""
    if mode == "iptables" and "nf_tables" not in lab.node.namespace.run(["iptables", "--version"]).stdout:
        pytest.skip("the kernel sends no notifications for changes by iptables-legacy")
    with TransactionMonitor(lab.node.namespace, ignore_table=PROBE_TABLE) as found:
        yield found


@pytest.fixture
def daemon(lab: Lab, tmp_path: Path, mode: str) -> Callable[..., Daemon]:
    """Create a daemon with additional flags."""

    def make(*flags: str) -> Daemon:
        return Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag(mode), *flags)

    return make


StartDaemon = Callable[..., Daemon]


def changes(commits: TransactionMonitor, mode: str) -> Sequence[object]:
    """Return the transactions that changed something since the last call.

    In nftables mode, a restart rewrites the rules of the existing table unchanged, so only elements count.
    """
    made = commits.new()
    return made if mode == "iptables" else [each for each in made if each.elements]


def test_stop_and_start_change_nothing(
    cluster: LabCluster, commits: TransactionMonitor, daemon: StartDaemon, mode: str
) -> None:
    with daemon() as first:
        first.wait_until_synced()
        rules = cluster.rules()
        assert changes(commits, mode)
        with ConnectionStream(cluster.targets()) as stream:
            stream.take()
            stream.mark("kill -9")
            first.kill()
            stream.take()
            for reason in ("SIGTERM", "last SIGTERM"):
                with daemon() as restarted:
                    stream.mark("start")
                    restarted.wait_until_synced()
                    stream.take()
                    assert changes(commits, mode) == []
                    assert cluster.rules() == rules
                    stream.mark(reason)
                    assert restarted.terminate() == 0
                stream.take()
                assert cluster.rules() == rules
            assert changes(commits, mode) == []
    assert stream.failure_report() == ""


@pytest.mark.parametrize("mode", ["iptables"], indirect=True)
def test_restart_writes_only_rules_that_changed_meanwhile(
    cluster: LabCluster, commits: TransactionMonitor, daemon: StartDaemon
) -> None:
    with daemon() as first:
        first.wait_until_synced()
        rules = cluster.rules()
        commits.new()
        with ConnectionStream(cluster.targets()) as stream:
            add_pod_while_stopped(cluster, stream, first, daemon)
            written = {chain for transaction in commits.new() for chain in transaction.chains}
            differing = set(rules.splitlines()) ^ set(cluster.rules().splitlines())
            assert written == {line.split()[1] for line in differing if line.startswith("-A ")}
    assert stream.failure_report() == ""


@pytest.mark.parametrize("mode", ["nftables"], indirect=True)
def test_restart_writes_only_elements_that_changed_meanwhile(
    lab: Lab, cluster: LabCluster, commits: TransactionMonitor, daemon: StartDaemon
) -> None:
    rules = NftablesRules(lab.node.namespace)
    with daemon() as first:
        first.wait_until_synced()
        before = rules.elements()
        commits.new()
        with ConnectionStream(cluster.targets()) as stream:
            add_pod_while_stopped(cluster, stream, first, daemon)
            written = Counter[str]()
            for transaction in commits.new():
                written.update(dict(transaction.elements))
            assert written == Counter(f"{TABLE} {name}" for _, name, _ in before ^ rules.elements())
            assert written
    assert stream.failure_report() == ""


def add_pod_while_stopped(cluster: LabCluster, stream: ConnectionStream, first: Daemon, daemon: StartDaemon) -> None:
    """Kill kproxy, add a pod, start kproxy again and stop it when the pod answers."""
    stream.take()
    first.kill()
    stream.mark("kill -9")
    cluster.start(0, REPLICAS)
    cluster.write(0, range(REPLICAS + 1))
    with daemon() as second:
        stream.mark("start")
        second.wait_until_synced()
        assert cluster.sockets([(0, REPLICAS)]) <= cluster.destinations()
        wait_until(lambda: f"demo/web-00/{REPLICAS}" in stream.take(), "an answer of the new pod")


def test_kill_during_changes_loses_no_connection(
    large_cluster: LabCluster, commits: TransactionMonitor, daemon: StartDaemon, mode: str
) -> None:
    cluster = large_cluster
    sets = [range(SET_SIZE), range(SET_SIZE, 2 * SET_SIZE)]
    with daemon() as first:
        first.wait_until_synced()
    with ConnectionStream(cluster.targets()) as stream:
        stream.take()
        for last in range(1, TRANSACTIONS[mode] + 1):
            ready = sets[last % 2]
            for service in range(SERVICES):
                cluster.write(service, ready)
            commits.new()
            with daemon() as victim:
                commits.wait_for(last)
                victim.kill()
                stream.mark(f"kill -9 after {last} transactions")
                stream.take()
            with daemon() as survivor:
                stream.mark("next start")
                survivor.wait_until_synced()
                assert cluster.destinations() == cluster.sockets((s, n) for s in range(SERVICES) for n in ready)
    assert stream.failure_report() == ""


def test_rolling_update_loses_no_connection(cluster: LabCluster, daemon: StartDaemon) -> None:
    with daemon(SHORT_SYNC_PERIOD) as running:
        running.wait_until_synced()
        with ConnectionStream(cluster.targets()) as stream:
            for old in range(REPLICAS):
                stream.mark(f"replacing pods {old}")
                replace(cluster, stream, old)
            answered = stream.take(8)
        assert running.is_up()
    assert stream.failure_report() == ""
    assert {int(pod.rpartition("/")[2]) for pod in answered} == set(range(REPLICAS, 2 * REPLICAS))


def replace(cluster: LabCluster, stream: ConnectionStream, old: int) -> None:
    """Replace one pod of every Service like a Deployment: start, mark terminating, wait for the rules, stop, remove."""
    new, others = old + REPLICAS, range(old + 1, old + REPLICAS)
    for service in range(SERVICES):
        cluster.start(service, new)
        cluster.write(service, [old, *others, new])
    started = cluster.sockets((service, new) for service in range(SERVICES))
    wait_until(lambda: started <= cluster.destinations(), f"rules for pods {new}")
    for service in range(SERVICES):
        cluster.write(service, [*others, new], terminating=[old])
    leaving = cluster.sockets((service, old) for service in range(SERVICES))
    wait_until(lambda: not leaving & cluster.destinations(), f"no rules for pods {old}")
    stream.settle()
    for service in range(SERVICES):
        cluster.stop(service, old)
        cluster.write(service, [*others, new])


def test_unreachable_pods_lose_only_their_own_connections(cluster: LabCluster, daemon: StartDaemon) -> None:
    with daemon(SHORT_SYNC_PERIOD) as running:
        running.wait_until_synced()
        with ConnectionStream(cluster.targets()) as stream:
            stream.take()
            gone = [(service, number) for number in range(REPLICAS - 1) for service in range(SERVICES)]
            for service, number in gone:
                stream.mark(f"pod {number} of web-{service:02} is unreachable")
                make_unreachable(cluster.pod(service, number))
                cluster.write(service, range(number + 1, REPLICAS))
            sockets = cluster.sockets(gone)
            wait_until(lambda: not sockets & cluster.destinations(), "no rules for the unreachable pods")
            stream.settle()
            lost = stream.failures()
            assert stream.describe([attempt for attempt in lost if attempt.outcome != UNREACHABLE]) == ""
            stream.mark("rules updated")
            answered = stream.take(2)
        assert running.is_up()
    assert stream.failures() == lost, stream.failure_report()
    assert {int(pod.rpartition("/")[2]) for pod in answered} == {REPLICAS - 1}
