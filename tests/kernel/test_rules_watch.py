"""The watch reports what other processes change in kproxy's tables, and nothing else."""

from __future__ import annotations

import errno
import logging
import os
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest

from kproxy.app.own_commits import OwnCommits
from kproxy.host import nf_tables_events
from kproxy.host.commands import CommandRunner
from kproxy.host.nf_tables import current_generation
from kproxy.host.nf_tables_events import RulesWatch
from kproxy.iptables.runner import IptablesRunner
from kproxy.model.drift import RulesChanged, Touched
from kproxy.model.sync_report import SyncReport
from kproxy.model.types import Family
from kproxy.nftables import names
from kproxy.nftables.base_table import SETS
from kproxy.nftables.elements import SetElement
from kproxy.nftables.kernel import NetlinkCommit, NftCommit, OwnGenerations
from kproxy.nftables.ruleset import NftChain
from kproxy.nftables.transaction import Transaction
from tests.lab.namespace import Namespace
from tests.lab.waiting import HANG_GUARD, wait_until

pytestmark = pytest.mark.usefixtures("kernel", "nft")
IPV4 = (Family.IPV4, names.TABLE)
EVERYTHING = RulesChanged({IPV4: Touched(everything=True)})


class Watched:
    """A watch of the table `ip kube-proxy`, which a commit of kproxy has created."""

    def __init__(self, node: Namespace, commit: NetlinkCommit | NftCommit, *, after_first_syncs: bool = False) -> None:
        self.node = node
        self.commit = commit
        self.generations = OwnGenerations()
        self._sentinels = 0
        self.reports: queue.SimpleQueue[RulesChanged] = queue.SimpleQueue()
        self.own_commit(Transaction(create_table=True, added_sets=list(SETS), added_chains=[NftChain("a", ())]))
        self.watch = RulesWatch(
            [IPV4],
            self.reports.put,
            is_own_port=commit.has_made_commits,
            is_own_commit=commit.is_author,
            newest_own_generation=self.generations.newest_after,
            after_first_syncs=after_first_syncs,
        )
        node.call(self.watch.start)

    def own_commit(self, transaction: Transaction) -> None:
        before = self.node.call(current_generation)
        self.node.call(lambda: self.commit(transaction))
        self.generations.record_commit(before)

    def nft(self, commands: str) -> None:
        self.node.run(["nft", "-f", "-"], commands)

    def report(self) -> RulesChanged:
        return self.reports.get(timeout=HANG_GUARD)

    def touched_until_now(self) -> list[Touched]:
        """Make one more change, wait until it is reported, and return all other changes that have been reported."""
        self._sentinels += 1
        sentinel = f"sentinel-{self._sentinels}"
        self.nft(f"add chain ip kube-proxy {sentinel}")
        found = []
        while sentinel not in (touched := self.report().tables[IPV4]).chains:
            found.append(touched)
        touched.chains.discard(sentinel)
        return [*found, touched] if touched else found

    def wait_until_watching(self) -> None:
        """Return once the watch reports changes."""

        def probe() -> bool:
            self.nft("add chain ip kube-proxy probe; delete chain ip kube-proxy probe")
            return not self.reports.empty()

        wait_until(probe, "the watch reports a change")
        assert all(touched.chains == {"probe"} for touched in self.touched_until_now())


@pytest.fixture(params=[NetlinkCommit, NftCommit])
def watched(namespace: Namespace, request: pytest.FixtureRequest) -> Iterator[Watched]:
    found = Watched(namespace, request.param(Family.IPV4))
    found.wait_until_watching()
    yield found
    found.watch.stop(HANG_GUARD)


def test_foreign_change_is_reported_with_the_name_of_the_process(watched: Watched) -> None:
    watched.nft("add element ip kube-proxy cluster-ips { 10.96.0.1 }")
    touched = Touched(elements={"cluster-ips": {bytes([10, 96, 0, 1])}}, by={"nft"})
    assert watched.report() == RulesChanged({IPV4: touched})


def test_own_changes_are_not_reported(watched: Watched) -> None:
    watched.own_commit(Transaction(added_elements={"cluster-ips": [SetElement(bytes([10, 96, 0, 2]))]}))
    watched.own_commit(Transaction(flushed_chains=["a"], deleted_chains=["a"]))
    assert watched.touched_until_now() == []


def test_changes_to_other_tables_are_not_reported(watched: Watched) -> None:
    watched.nft("add table ip other; add chain ip other a; add table ip6 kube-proxy; add chain ip6 kube-proxy a")
    assert watched.touched_until_now() == []


@pytest.fixture
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf_tables_events, "_RECEIVE_BUFFER", 4096)


def many_elements() -> Transaction:
    keys = [number.to_bytes(4, "big") for number in range(20_000)]
    return Transaction(added_elements={"cluster-ips": list(map(SetElement, keys))})


@contextmanager
def busy_watch(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the watch busy with the first notification while its buffer overflows."""
    go_on = threading.Event()
    feed = watched.watch._decoder.feed

    def slow_feed(datagram: bytes) -> None:
        go_on.wait(HANG_GUARD)
        feed(datagram)

    monkeypatch.setattr(watched.watch._decoder, "feed", slow_feed)
    yield
    go_on.set()


@pytest.mark.usefixtures("small_buffer")
def test_lost_notifications_touch_everything(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    with busy_watch(watched, monkeypatch):
        elements = ", ".join(f"{number >> 8}.{number & 255}.0.9" for number in range(20_000))
        watched.nft(f"add table ip other; add set ip other s {{ type ipv4_addr; elements = {{ {elements} }}; }}")
    assert watched.report() == EVERYTHING
    assert watched.touched_until_now() == []


@pytest.mark.usefixtures("small_buffer")
def test_lost_notifications_about_own_commits_are_not_reported(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with busy_watch(watched, monkeypatch):
        watched.own_commit(many_elements())
    # A later commit by another process could not be told from those whose notifications were lost.
    current = watched.node.call(current_generation)
    wait_until(
        lambda: current in {watched.watch._known_generation, watched.watch._decoder.generation}, "the watch caught up"
    )
    assert watched.touched_until_now() == []
    assert caplog.text == ""


def synced() -> SyncReport:
    return SyncReport(Family.IPV4, 0.0, 0.0, None)


@pytest.mark.parametrize("foreign", [False, True])
def test_watch_that_begins_after_the_first_sync_checks_everything_only_after_foreign_commits(
    namespace: Namespace, foreign: bool
) -> None:
    found = Watched(namespace, NetlinkCommit(Family.IPV4), after_first_syncs=True)
    wait_until(lambda: found.watch._known_generation is not None, "the watch knows the current generation ID")
    found.own_commit(many_elements())
    if foreign:
        found.nft("add table ip other")
    found.watch.on_sync(synced())
    if foreign:
        assert found.report() == EVERYTHING
    current = namespace.call(current_generation)
    wait_until(lambda: found.watch._known_generation == current, "the watch begins")
    found.wait_until_watching()
    assert found.reports.empty()
    found.watch.stop(HANG_GUARD)


def test_watch_restarts_after_an_error(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nf_tables_events, "FIRST_RETRY_SECONDS", 0.01)
    opened = nf_tables_events._open_socket
    failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), RuntimeError("a bug")]

    def fail_first() -> socket.socket:
        if failures:
            raise failures.pop(0)
        return opened()

    monkeypatch.setattr(nf_tables_events, "_open_socket", fail_first)
    with caplog.at_level(logging.WARNING):
        found = Watched(namespace, NetlinkCommit(Family.IPV4))
        assert found.report() == EVERYTHING
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == [
        "Too many open files",
        "unexpected RuntimeError('a bug')",
    ]
    found.wait_until_watching()
    found.watch.stop(HANG_GUARD)


def test_stopped_watch_ends_its_thread(namespace: Namespace) -> None:
    for after_first_syncs in (False, True):
        found = Watched(namespace, NetlinkCommit(Family.IPV4), after_first_syncs=after_first_syncs)
        found.watch.stop(HANG_GUARD)
        assert not found.watch._thread.is_alive()


def test_programs_are_known_by_process_and_process_group_until_they_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = CommandRunner()
    script = "echo $$; sh -c 'echo $$; exec sleep 600' & exec cat"
    with commands.stream_output(["sh", "-c", f"{script} /dev/zero"], timeout=HANG_GUARD) as lines:
        leader = int(next(lines))
        child = int(next(lines).strip("\0"))
        assert commands.has_run(leader)
        assert commands.has_run(child)
        assert not commands.has_run(os.getpid())
    assert commands.has_run(leader)
    monkeypatch.setattr("kproxy.host.commands.monotonic", Mock(return_value=1e9))
    assert not commands.has_run(leader)


def test_changes_by_iptables_programs_of_kproxy_are_not_reported(namespace: Namespace) -> None:
    nat = (Family.IPV4, "nat")
    runner = IptablesRunner(Family.IPV4)
    reports: queue.SimpleQueue[RulesChanged] = queue.SimpleQueue()
    watch = RulesWatch([nat], reports.put, is_own_port=runner.has_run, is_own_commit=runner.has_committed)
    namespace.run(["iptables-nft", "-t", "nat", "-N", "TABLE-EXISTS"])
    namespace.call(watch.start)

    def probe() -> bool:
        namespace.run(["iptables-nft", "-t", "nat", "-F", "TABLE-EXISTS"])
        namespace.run(["iptables-nft", "-t", "nat", "-A", "TABLE-EXISTS", "-j", "RETURN"])
        return not reports.empty()

    wait_until(probe, "the watch reports a change")
    namespace.call(lambda: runner.restore("*nat\n:OWN - [0:0]\n-A OWN -j RETURN\nCOMMIT\n"))
    namespace.run(["iptables-nft", "-t", "nat", "-N", "FOREIGN"])
    chains: set[str] = set()
    names_of_programs: set[str] = set()
    while "FOREIGN" not in chains:
        touched = reports.get(timeout=HANG_GUARD).tables[nat]
        chains |= touched.chains
        names_of_programs |= touched.by
    assert chains == {"TABLE-EXISTS", "FOREIGN"}
    assert names_of_programs == {"iptables-nft"}
    watch.stop(HANG_GUARD)


def test_changes_by_a_program_in_another_pid_namespace_with_the_same_pid_are_reported(namespace: Namespace) -> None:
    """The netlink port ID is the PID in the PID namespace of the program. Numbers in containers are often the same."""
    nat = (Family.IPV4, "nat")
    runner, commands = IptablesRunner(Family.IPV4), CommandRunner()
    reports: queue.SimpleQueue[RulesChanged] = queue.SimpleQueue()
    own = OwnCommits()
    own.add([nat], runner.has_run, runner.has_committed)
    own.add([], commands.has_run, commands.has_committed)
    watch = RulesWatch(own.tables, reports.put, is_own_port=own.owns, is_own_commit=own.confirms)
    namespace.run(["iptables-nft", "-t", "nat", "-N", "KUBE-SERVICES"])
    namespace.call(watch.start)

    def probe() -> bool:
        namespace.run(["iptables-nft", "-t", "nat", "-F", "KUBE-SERVICES"])
        namespace.run(["iptables-nft", "-t", "nat", "-A", "KUBE-SERVICES", "-j", "RETURN"])
        return not reports.empty()

    def foreign(pid: int) -> None:
        """Change the table with a process that has this PID in a PID namespace of its own."""
        script = f"echo {pid - 1} > /proc/sys/kernel/ns_last_pid; nft add rule ip nat KUBE-SERVICES counter & wait"
        namespace.run(["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", script])

    def last_pid(of: CommandRunner) -> int:
        return list(of._exited)[-1]

    def touched_by_others() -> list[Touched]:
        """Return what is reported before the next change by `iptables-nft`."""
        namespace.run(["iptables-nft", "-t", "nat", "-N", "LAST"])
        found: list[Touched] = []
        while not found or "LAST" not in found[-1].chains:
            found.append(reports.get(timeout=HANG_GUARD).tables[nat])
        namespace.run(["iptables-nft", "-t", "nat", "-X", "LAST"])
        while "LAST" not in reports.get(timeout=HANG_GUARD).tables[nat].chains:
            pass
        return found

    wait_until(probe, "the watch reports a change")
    touched_by_others()
    namespace.call(lambda: runner.restore("*nat\n:KUBE-OWN - [0:0]\n-A KUBE-OWN -j RETURN\nCOMMIT\n"))
    assert not any(touched.everything for touched in touched_by_others())
    foreign(last_pid(runner._commands))
    assert any(touched.everything and "nft" in touched.by for touched in touched_by_others())
    # A program that changes no rules.
    namespace.call(lambda: commands.run(["true"], timeout=HANG_GUARD))
    foreign(last_pid(commands))
    assert any(touched.everything and "nft" in touched.by for touched in touched_by_others())
    watch.stop(HANG_GUARD)


def test_awakening_a_dormant_table_is_not_reported(namespace: Namespace) -> None:
    nat = (Family.IPV4, "nat")
    runner = IptablesRunner(Family.IPV4)
    reports: queue.SimpleQueue[RulesChanged] = queue.SimpleQueue()
    watch = RulesWatch([nat], reports.put, is_own_port=runner.has_run, is_own_commit=runner.has_committed)
    namespace.run(["iptables-nft", "-t", "nat", "-N", "TABLE-EXISTS"])
    namespace.call(watch.start)

    def probe() -> bool:
        namespace.run(["nft", "add table ip nat; add table ip nat { flags dormant; }"])
        namespace.run(["nft", "add table ip nat { }"])
        return not reports.empty()

    wait_until(probe, "the watch reports a change")
    namespace.run(["nft", "add table ip nat { flags dormant; }"])
    namespace.run(["iptables-nft", "-t", "nat", "-N", "LAST-PROBE"])
    while "LAST-PROBE" not in reports.get(timeout=HANG_GUARD).tables[nat].chains:
        pass
    before = namespace.call(runner.foreign_changes)
    assert namespace.call(lambda: runner.awaken("nat"))
    assert not namespace.call(lambda: runner.awaken("nat"))
    assert namespace.call(runner.foreign_changes) == before
    namespace.run(["iptables-nft", "-t", "nat", "-N", "FOREIGN"])
    assert reports.get(timeout=HANG_GUARD).tables[nat] == Touched(chains={"FOREIGN"}, by={"iptables-nft"})
    watch.stop(HANG_GUARD)
