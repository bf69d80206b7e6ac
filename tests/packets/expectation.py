"""An outcome in the words of the table."""

from __future__ import annotations

from kproxy.simulate.packet import OutcomeDistribution, PacketOutcome, Verdict
from tests.packets.table import split_socket

EXACTLY = 1e-6
"""By how much the probabilities of a dump may differ from equal ones, which it cannot write down exactly."""


def describe(outcome: OutcomeDistribution) -> str:
    """Return everything that may happen, in an order of its own, so that equal outcomes have equal words."""
    endpoints: dict[str, list[str]] = {}
    for fate in outcome.probabilities:
        endpoints.setdefault(_manner(fate), []).extend([fate.endpoint] if _arrives(fate) and fate.endpoint else [])
    parts = (f"{manner} {', '.join(sorted(found, key=_order))}".strip() for manner, found in endpoints.items())
    return "; ".join(sorted(parts))


def uneven(outcome: OutcomeDistribution, tolerance: float = EXACTLY) -> dict[str, float]:
    """Return the endpoints whose probability is not that of the others, or is by more than a part of it."""
    return {
        target: share
        for target, share in outcome.endpoints.items()
        if abs(share * len(outcome.endpoints) - 1) > tolerance
    }


def _arrives(fate: PacketOutcome) -> bool:
    return fate.verdict is Verdict.ACCEPTED


def _manner(fate: PacketOutcome) -> str:
    if fate.verdict is Verdict.DROPPED:
        return "drop"
    if fate.verdict is Verdict.REJECTED:
        return f"reject {fate.reject_with.removeprefix('icmp-').removeprefix('icmp6-')}"
    words = ["dnat" if fate.endpoint else "untouched"]
    words += ["masq"] if fate.masqueraded else []
    words += ["affinity"] if fate.affinity_recorded else []
    return "+".join(words)


def _order(socket: str) -> tuple[str, int]:
    return split_socket(socket)
