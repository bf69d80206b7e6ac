"""IP families that were skipped at startup are probed until one works."""

from __future__ import annotations

import queue
from collections.abc import Callable

import pytest

from kproxy.app.skipped_families import SkippedFamilies
from kproxy.host.commands import CommandError, InconclusiveError
from kproxy.model.types import Family
from kproxy.nftables.probe import NftablesUnsupportedError
from tests.lab.waiting import HANG_GUARD

Probe = Callable[[Family], object]


def failing_at_first(*errors: Exception) -> tuple[list[Family], Probe]:
    """Return a probe that raises these errors in turn and works afterwards, and the families of its calls."""
    calls: list[Family] = []
    left = list(errors)

    def probe(family: Family) -> None:
        calls.append(family)
        if left:
            raise left.pop(0)

    return calls, probe


@pytest.mark.parametrize("family", Family)
def test_family_that_works_later_is_reported_once(family: Family) -> None:
    calls, probe = failing_at_first(
        CommandError("ip6tables failed"),
        InconclusiveError("ip6tables timed out"),
        NftablesUnsupportedError("no NAT"),
        OSError("out of memory"),
        ValueError("unexpected"),
    )
    reported: queue.Queue[Family] = queue.Queue()
    component = SkippedFamilies([family], probe, reported.put, first_probe=1e-4)
    component.start()
    assert reported.get(timeout=HANG_GUARD) is family
    component.stop(HANG_GUARD)
    assert calls == [family] * 6
    assert reported.empty()


def test_each_skipped_family_is_probed() -> None:
    calls, probe = failing_at_first(CommandError("iptables failed"))
    reported: queue.Queue[Family] = queue.Queue()
    component = SkippedFamilies(list(Family), probe, reported.put, first_probe=1e-4)
    component.start()
    assert reported.get(timeout=HANG_GUARD) is Family.IPV6
    component.stop(HANG_GUARD)
    assert calls == [Family.IPV4, Family.IPV6]


def test_nothing_is_probed_if_no_family_was_skipped() -> None:
    calls, probe = failing_at_first()
    component = SkippedFamilies([], probe, lambda _: None, first_probe=0.0)
    component.start()
    component.stop(HANG_GUARD)
    assert calls == []
