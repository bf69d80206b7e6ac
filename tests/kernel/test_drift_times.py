"""The damages whose repair times are measured: each changes the rules as its table says, in every mode and family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kproxy.model.types import Family
from tests.bench.commit_monitor import CommitMonitor
from tests.drift_times import victims
from tests.drift_times.__main__ import summary
from tests.drift_times.damages import damages
from tests.drift_times.kernel_state import differing
from tests.drift_times.measure import Measurement, Repair
from tests.drift_times.testbed import DamagedNode
from tests.lab.iptables import PREFIXES, missing_variant
from tests.lab.namespace import Namespace
from tests.lab.waiting import HANG_GUARD

KINDS = 40
MODES = ("nftables", "iptables-nft", "iptables-legacy")

pytestmark = pytest.mark.usefixtures("kernel", "nft")


@pytest.fixture(params=MODES)
def testbed(request: pytest.FixtureRequest, namespace: Namespace, tmp_path: Path) -> Iterator[DamagedNode]:
    """Ten Services without a daemon."""
    mode: str = request.param
    if reason := missing_variant(mode.rpartition("-")[2], namespace) if mode != "nftables" else "":
        pytest.skip(reason)
    with DamagedNode(mode, 10, tmp_path) as found:
        found.apply()
        yield found


class SavedRules:
    """The current rules of a node, to be restored after each damage."""

    def __init__(self, testbed: DamagedNode) -> None:
        self._testbed = testbed
        self._commands = [(["nft", "-f", "-"], testbed.node.run(["nft", "list", "ruleset"]).stdout)]
        if testbed.mode != "nftables":
            variant = testbed.mode.removeprefix("iptables-")
            names = [f"{prefix}-{variant}" for prefix in PREFIXES.values()]
            self._commands = [([f"{name}-restore"], testbed.node.run([f"{name}-save"]).stdout) for name in names]

    def restore(self) -> None:
        self._testbed.flush()
        for command, text in self._commands:
            self._testbed.node.run(command, text)


REPAIRED = {
    "nftables": ("delete the table", "flush chain services", "delete an element of service-ips"),
    "iptables": (
        "flush table nat",
        "delete the jump from PREROUTING to KUBE-SERVICES in table nat",
        "flush <svc> of table nat",
    ),
}
"""Some of the damages of each mode."""


def test_running_daemon_repairs_damage_long_before_the_next_periodic_check(testbed: DamagedNode) -> None:
    """No periodic check is due for 12 hours, so only a notification or the poll can lead to the repair in time.

    `make repair-times` does this for all kinds of damage, and fails if the median or the 99th percentile is too long.
    """
    chosen = [each for each in damages(testbed.mode) if each.name in REPAIRED[testbed.mode.partition("-")[0]]]
    assert len(chosen) == 3
    with CommitMonitor(testbed.node) as monitor:
        testbed.start()
        measurement = Measurement(testbed, monitor, patience=HANG_GUARD)
        repairs = [repair for family in Family for repair in measurement.run(chosen, family)]
    assert [repair for repair in repairs if repair.seconds is None] == []


def test_repair_times_above_the_goal_are_a_failure() -> None:
    quick = [Repair("a", Family.IPV4, 0.5, 0.0)] * 1000
    slow, late, never = (Repair("b", Family.IPV4, seconds, 0.0) for seconds in (1.5, 2.5, None))
    assert summary("nftables", quick)[1]
    assert summary("nftables", [*quick, never])[1] is False
    assert summary("nftables", [slow] * 1000)[1] is False
    assert summary("nftables", [*quick, *[late] * 20])[1] is False


@pytest.mark.parametrize("family", Family)
def test_each_damage_changes_its_parts(testbed: DamagedNode, family: Family) -> None:
    assert len({each.name for each in damages(testbed.mode)}) == len(damages(testbed.mode)) >= KINDS
    stranger = testbed.stranger
    other = next(each for each in Family if each is not family)
    before, untouched, rules = stranger.read(family), stranger.read(other), SavedRules(testbed)
    wrong = []
    for turn, damage in enumerate(damages(testbed.mode)):
        names = stranger.names(family, victims.number_of(damage.service, turn, testbed.services))
        parts = stranger.parts(damage, names)
        try:
            stranger.run(damage.command, names)
        except RuntimeError as error:
            wrong.append((damage.name, str(error)))
            continue
        changed = differing(before, stranger.read(family))
        expected = {f"set {part.split()[1]}" if part.startswith("element ") else part for part in parts}
        if (not changed and damage.proof == "rules") or (
            parts != ("all",) and not set(changed) <= expected | set(damage.leaves)
        ):
            wrong.append((damage.name, f"expected {sorted(expected)} to change, not {changed}"))
        if "flush ruleset" not in damage.name and stranger.read(other) != untouched:
            wrong.append((damage.name, "also changes the other family"))
        rules.restore()
        if stranger.read(family) != before:
            wrong.append((damage.name, f"not restored: {differing(before, stranger.read(family))}"))
    assert wrong == []
