"""Measure the time from a damage to its repair: by the kernel's notifications, its rules, and connections."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from kproxy.model.types import Family
from tests.bench.commit_monitor import CommitMonitor
from tests.drift_times import victims
from tests.drift_times.damages import Damage
from tests.drift_times.kernel_state import ALL, State, difference, differing
from tests.drift_times.probes import Probes
from tests.drift_times.stranger import STRANGER
from tests.drift_times.testbed import SMALL, DamagedNode

POLL_INTERVAL = 0.005
NOTICE_SECONDS = 0.1
"""Seconds that a notification may take."""

SUCCESSES = 30
"""Connections that must succeed in a row before connections count as repaired."""

Verdict: TypeAlias = Literal["repaired", "never", "no effect"]


@dataclass(frozen=True)
class Repair:
    """The repair of one damage, in seconds from the commit of the damage; without a repair, `seconds` is None.

    `outage` is the time from the damage to the start of the last connection that failed. `differing` are the parts that
    were still different in the end.
    """

    damage: str
    family: Family
    seconds: float | None
    outage: float
    differing: tuple[str, ...] = ()
    error: str = ""

    @property
    def text(self) -> str:
        """One line for the report."""
        when = "never" if self.seconds is None else f"{self.seconds * 1000:6.0f} ms"
        more = self.error or ", ".join(self.differing[:3])
        return f"{self.family.value}  {when:>9}  outage {self.outage * 1000:6.0f} ms  {self.damage}  {more}".rstrip()


class Measurement:
    """Inflicts damages on the rules of a running daemon, one at a time, and measures the repairs."""

    def __init__(self, testbed: DamagedNode, monitor: CommitMonitor, *, patience: float) -> None:
        """`patience` is the number of seconds after which a damage counts as never repaired."""
        self._testbed, self._monitor, self._patience = testbed, monitor, patience
        self._repaired: set[tuple[Family, str]] = set()
        self._turn = 0

    def run(self, damages: Sequence[Damage], family: Family) -> list[Repair]:
        """Inflict each damage once and print each repair."""
        found = []
        for damage in damages:
            self._turn += 1
            try:
                repair = self._measure(damage, family)
            except (RuntimeError, KeyError) as error:
                repair = Repair(damage.name, family, None, 0.0, error=str(error))
            print(repair.text, flush=True)
            found.append(repair)
            if repair.seconds is None:
                self._testbed.start_anew()
                self._repaired.clear()
        return found

    def _measure(self, damage: Damage, family: Family) -> Repair:
        stranger = self._testbed.stranger
        names = stranger.names(family, victims.number_of(damage.service, self._turn, self._testbed.services))
        parts = stranger.parts(damage, names)
        self._forget_repairs(parts, family)
        looked_at = ALL if self._testbed.services <= SMALL else self._fewer(parts, names)
        before = self._testbed.stranger.read(family, looked_at)
        with Probes(self._testbed.client, names["ip"]) as probes:
            _wait_for_successes(probes, time.monotonic())
            start = time.monotonic_ns()
            stranger.run(damage.command, names)
            began = self._first_commit(start)
            if damage.proof == "connection":
                seconds, after = self._wait_for_connections(probes, began), before
            else:
                seconds, after = self._wait_for_rules(before, looked_at, family, began, damage.leaves)
            _wait_for_successes(probes, time.monotonic() - 0.1, seconds=1.0)
            outage = probes.outage(began / 1e9)
        if damage.undo and seconds is not None:
            stranger.run(damage.undo, names)
            self._testbed.restart()
            self._repaired.clear()
        self._repaired |= {(family, part) for part in parts}
        if before != after:
            self._testbed.record(difference(before, after, f"{family.value}: {damage.name}"))
        return Repair(damage.name, family, seconds, outage, tuple(differing(before, after)))

    def _fewer(self, parts: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, ...]:
        """Return the parts to look at in a large cluster."""
        if parts != ALL:
            return parts
        ip = names["ip"]
        if self._testbed.mode == "nftables":
            keys = {"service-ips": f"{ip} . tcp . 80", "service-endpoints": f"{ip} . tcp . 80 . 0"}
            return ("set cluster-ips", *(f"element {name} {{ {key} }}" for name, key in keys.items()))
        per_service = (f"nat {names['svc']}", f"nat {names['dispatch']}", f"filter {names['reject_dispatch']}")
        shared = (
            "nat KUBE-POSTROUTING",
            "nat PREROUTING",
            "nat KUBE-SERVICES",
            "filter FORWARD",
            "filter KUBE-FORWARD",
        )
        return (*per_service, *shared, "mangle KUBE-PROXY-CANARY")

    def _forget_repairs(self, parts: tuple[str, ...], family: Family) -> None:
        """Restart the daemon if it has repaired any of these parts before, because it waits before it does so again."""
        known = {part for owner, part in self._repaired if owner is family}
        if known & set(parts) or "all" in known or ("all" in parts and known):
            self._testbed.restart()
            self._repaired.clear()

    def _first_commit(self, start: int) -> int:
        """Return the time of the damage: its first commit, or `start` if the kernel sends no notifications."""
        deadline = time.monotonic() + (0.0 if self._testbed.mode == "iptables-legacy" else 1.0)
        while True:
            for commit in self._monitor.since(start):
                if commit.process.startswith(STRANGER):
                    return commit.time
            if time.monotonic() >= deadline:
                return start
            time.sleep(POLL_INTERVAL)

    def _wait_for_rules(
        self, before: State, parts: tuple[str, ...], family: Family, began: int, leaves: tuple[str, ...]
    ) -> tuple[float | None, State]:
        """Read the rules after each commit until they are the same as before. Return the time of that commit."""
        deadline = time.monotonic() + self._patience
        seen = 0
        while True:
            last = self._last_commit(began)
            late = time.monotonic() >= deadline
            if last != seen or late:
                reading = time.monotonic_ns()
                after = self._testbed.stranger.read(family, parts)
                for part in leaves:
                    after.pop(part, None)
                if after == before:
                    return self._repair_time(began, reading), after
                if late:
                    return None, after
                seen = last
            time.sleep(POLL_INTERVAL)

    def _repair_time(self, began: int, reading: int) -> float:
        """Return the seconds from the damage to the repair, if the rules were the same as before at time `reading`."""
        if self._testbed.mode == "iptables-legacy":
            return (reading - began) / 1e9
        time.sleep(NOTICE_SECONDS)
        commits = [each.time for each in self._monitor.since(began) if not each.process.startswith(STRANGER)]
        if not commits:
            raise RuntimeError("no effect: the rules are the same as before, although only the damage was committed")
        return (max((each for each in commits if each <= reading), default=commits[0]) - began) / 1e9

    def _last_commit(self, began: int) -> int:
        """Return the time of the last commit, or the current time if the kernel sends no notifications."""
        if self._testbed.mode == "iptables-legacy":
            return time.monotonic_ns()
        commits = self._monitor.since(began)
        return commits[-1].time if commits else began

    def _wait_for_connections(self, probes: Probes, began: int) -> float | None:
        """Return the time of the last connection that failed, once connections succeed again."""
        if _wait_for_successes(probes, began / 1e9, seconds=self._patience):
            return probes.outage(began / 1e9)
        return None


def _wait_for_successes(probes: Probes, since: float, *, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while probes.succeeded_after(since) < SUCCESSES:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_INTERVAL)
    return True
