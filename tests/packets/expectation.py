"""Describe the outcome of a packet in the notation of the table."""

from __future__ import annotations

from kproxy.simulate.packet import OutcomeDistribution, PacketOutcome, Verdict
from tests.packets.table import split_socket

EXACTLY = 1e-6
"""Relative deviation of a probability that is due to rounding in a dump."""


def describe(outcome: OutcomeDistribution) -> str:
    """Return all possible fates in a canonical order, so that equal outcomes have equal descriptions."""
    endpoints: dict[str, list[str]] = {}
    for fate in outcome.probabilities:
        endpoints.setdefault(_action(fate), []).extend([fate.endpoint] if _is_accepted(fate) and fate.endpoint else [])
    parts = (f"{action} {', '.join(sorted(targets, key=_order))}".strip() for action, targets in endpoints.items())
    return "; ".join(sorted(parts))


def uneven(outcome: OutcomeDistribution, tolerance: float = EXACTLY) -> dict[str, float]:
    """Return the endpoints whose probability deviates from an equal share by more than `tolerance`, relatively."""
    return {
        target: share
        for target, share in outcome.endpoints.items()
        if abs(share * len(outcome.endpoints) - 1) > tolerance
    }


def _is_accepted(fate: PacketOutcome) -> bool:
    return fate.verdict is Verdict.ACCEPTED


def _action(fate: PacketOutcome) -> str:
    if fate.verdict is Verdict.DROPPED:
        return "drop"
    if fate.verdict is Verdict.REJECTED:
        return f"reject {fate.reject_with.removeprefix('icmp-').removeprefix('icmp6-')}"
    actions = ["dnat" if fate.endpoint else "untouched"]
    actions += ["masq"] if fate.masqueraded else []
    actions += ["affinity"] if fate.affinity_recorded else []
    return "+".join(actions)


def _order(socket: str) -> tuple[str, int]:
    return split_socket(socket)
