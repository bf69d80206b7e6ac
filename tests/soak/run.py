"""One run of the soak test, and its outcome."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kproxy.model.types import Family
from tests.apiserver import ApiServer
from tests.apiserver.relay import Relay
from tests.drift_times.kernel_state import differing, without_jumps_to_firewall
from tests.drift_times.stranger import Stranger
from tests.lab.namespace import Namespace
from tests.lab.topology import Host, Lab
from tests.soak.actors import OTHER, Actors
from tests.soak.cluster import NODES, PORT, SoakCluster, addresses_on
from tests.soak.node import Proxy
from tests.soak.traffic import Failure, PodServers, Traffic, Window, Windows

INSIDE_RATE, OUTSIDE_RATE = 170.0, 70.0
"""New connections per second of the client in the cluster and of the one outside."""

LONGEST_PAUSE = 0.3
"""Maximum number of seconds between two actions."""

MAX_SHOWN = 20


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. `text` is the summary, and `problems` are the reasons why the run has failed."""

    text: str
    problems: tuple[str, ...]


class Soak:
    """One run in one mode. Everything is created in namespaces that are removed at the end."""

    def __init__(self, mode: str, seconds: float, seed: int, folder: Path, *, variant: str = "nft") -> None:
        """`variant` is the variant of iptables, `nft` or `legacy`. Logs are written to the folder."""
        self._mode, self._seconds, self._folder, self._variant = mode, seconds, folder, variant
        self._random = random.Random(seed)
        self._events = (folder / "events.log").open("w", buffering=1)
        self._start = time.monotonic()
        self._actions: Counter[str] = Counter()
        self._problems: list[str] = []

    def run(self) -> Outcome:
        """Run, and return the outcome. Raises `RuntimeError` if kproxy or a client exits."""
        with ExitStack() as stack:
            lab = stack.enter_context(Lab())
            node = lab.node.namespace
            api = stack.enter_context(ApiServer())
            api.faults.protobuf = self._random.choice(("supported", "ignored"))
            relay = stack.enter_context(Relay(api.address, listen=lambda port: node.call(lambda: _listen(port))))
            cluster = SoakCluster(api, self._random)
            machines = [
                (lab.add_pod(f"pods-{name}", *addresses_on(name), node=name).namespace, addresses_on(name))
                for name in NODES
            ]
            inside = lab.add_pod("client", "10.244.1.250", "fd00:10:244:1::250")
            outside = lab.add_client("visitor", "198.51.100.10", "2001:db8:51::10")
            PodServers(self._folder, machines, PORT)
            proxy = stack.enter_context(Proxy(node, f"http://127.0.0.1:{relay.port}", self._folder, self._variant))
            strangers = {
                mode: Stranger(
                    node, "nftables" if mode == "nftables" else f"iptables-{self._variant}", self._folder / mode
                )
                for mode in OTHER
            }
            windows = Windows()
            actors = Actors(
                node=node,
                proxy=proxy,
                api=api,
                relay=relay,
                cluster=cluster,
                windows=windows,
                strangers=strangers,
                chance=self._random,
                log=self._log,
            )
            actors.restart(self._mode)
            traffic = self._traffic(cluster, inside, outside)
            with traffic:
                self._act(actors, traffic)
                actors.finish()
                traffic.settle()
                traffic.read()
            growths = proxy.growths()
            stale = self._compare_with_fresh_start(node, proxy, cluster, actors, strangers[self._mode])
            problems = [f"differs from a fresh start: {each}" for each in stale]
            problems += [f"grows: {each.text}" for each in growths if not each.is_flat]
            problems += [f"log: {each}" for each in proxy.bad_lines()]
            lines = [f"{proxy.starts} starts of kproxy", *(each.text for each in growths)]
            return self._outcome(actors, traffic, windows, lines, problems)

    def _traffic(self, cluster: SoakCluster, inside: Host, outside: Host) -> Traffic:
        clients = [
            (inside, INSIDE_RATE, cluster.targets(outside=False)),
            (outside, OUTSIDE_RATE, cluster.targets(outside=True)),
        ]
        return Traffic(self._folder, clients)

    def _log(self, text: str) -> None:
        print(f"{time.monotonic() - self._start:8.3f} s  {text}", file=self._events)

    def _act(self, actors: Actors, traffic: Traffic) -> None:
        """Let the actors act. In the second half, kproxy is not restarted, so that it shows whether it grows."""
        self._start = began = time.monotonic()
        deck = actors.actions(restarts=True)
        while (elapsed := time.monotonic() - began) < self._seconds:
            late = elapsed > self._seconds / 2
            if not deck:
                deck = actors.actions(restarts=not late)
            action = deck.pop()
            if not (late and action.restarts):
                self._actions[action.name] += 1
                self._log(f"{action.name}: {action.run()}")
            pause = time.monotonic() + self._random.uniform(0.0, LONGEST_PAUSE)
            while time.monotonic() < pause:
                actors.tick()
                time.sleep(0.05)
            actors.restart_if_exited()
            traffic.read()

    def _compare_with_fresh_start(
        self, node: Namespace, proxy: Proxy, cluster: SoakCluster, actors: Actors, stranger: Stranger
    ) -> list[str]:
        """Return the parts of the rules that differ from those after a start on a node without rules."""
        cluster.delete_all_transient()
        actors.wait_for_mark()
        time.sleep(1.0)
        before = {family: stranger.read(family) for family in Family}
        self._log("stop, flush and start kproxy, to compare the rules")
        if code := proxy.terminate():
            return [f"kproxy exited with status {code}"]
        flush(node, self._variant)
        actors.restart(self._mode)
        after = {family: stranger.read(family) for family in Family}
        found = []
        for family in Family:
            one, other = (without_jumps_to_firewall(each[family]) for each in (before, after))
            found += [
                f"{family.value} {part}: {one.get(part)}, after a fresh start {other.get(part)}"
                for part in differing(one, other)
            ]
        return found

    def _outcome(
        self,
        actors: Actors,
        traffic: Traffic,
        windows: Windows,
        more_lines: Sequence[str],
        more_problems: Sequence[str],
    ) -> Outcome:
        """Return the outcome. The last two arguments are added to its text and its problems."""
        explained = {id(each): windows.explanation(each) for each in traffic.failures}
        unexplained = [each for each in traffic.failures if explained[id(each)] is None]
        actions = ", ".join(f"{count} {name}" for name, count in sorted(self._actions.items()))
        lines = [f"{self._mode} mode: {actions}"]
        lines += [f"  {actors.damages} damages of one Service, {actors.flushes} of a whole table"]
        lines += _table(traffic)
        lines += _explanations(traffic.failures, explained)
        lines += [f"  {each}" for each in more_lines]
        problems = [*self._problems]
        problems += [f"failed: {each.label}: {each.text(self._start)}" for each in unexplained]
        problems += [f"kproxy exited with status {each}" for each in actors.exits]
        problems += [f"not repaired: {each}" for each in actors.not_repaired]
        return Outcome("\n".join(lines), (*problems, *more_problems))


def _table(traffic: Traffic) -> list[str]:
    failed = Counter(each.label for each in traffic.failures)
    found = [f"  {'class':24}{'connections':>12}{'failures':>10}"]
    return found + [f"  {label:24}{count:12,}{failed[label]:10,}" for label, count in sorted(traffic.counts.items())]


def _explanations(failures: Sequence[Failure], explained: Mapping[int, Window | None]) -> list[str]:
    """Return one line for each interval that explains failures."""
    counts: Counter[str] = Counter()
    for each in failures:
        window = explained[id(each)]
        if window is not None:
            counts[f"{window.ended - window.began:6.2f} s, {window.cause}: {each.label}"] += 1
    return [f"  {count:5} failures within {text}" for text, count in sorted(counts.items())]


def flush(node: Namespace, variant: str) -> None:
    """Remove all rules from a node."""
    node.run(["nft", "flush", "ruleset"])
    if variant == "legacy":
        for program in ("iptables-legacy-restore", "ip6tables-legacy-restore"):
            for table in ("nat", "filter", "mangle"):
                node.run([program], f"*{table}\nCOMMIT\n")


def _listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=64)
