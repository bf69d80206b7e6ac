"""Describe the outcome of a packet in the notation of the table."""

from __future__ import annotations

from kproxy.simulate.packet import Fate, FateDistribution, Verdict
from tests.packets.table import split_socket

EXACTLY = 1e-6
"""Relative deviation of a probability that is due to rounding in a dump."""


def describe(outcome: FateDistribution) -> str:
    """Return all possible fates in a canonical order, so that equal outcomes have equal descriptions."""
    endpoints: dict[str, list[str]] = {}
    for fate in outcome.fates:
        endpoints.setdefault(_action(fate), []).extend([fate.target] if _is_accepted(fate) and fate.target else [])
    parts = (f"{action} {', '.join(sorted(targets, key=_order))}".strip() for action, targets in endpoints.items())
    return "; ".join(sorted(parts))


def uneven(outcome: FateDistribution, tolerance: float = EXACTLY) -> dict[str, float]:
    """Return the endpoints whose probability deviates from an equal share by more than `tolerance`, relatively."""
    return {
        target: share for target, share in outcome.targets.items() if abs(share * len(outcome.targets) - 1) > tolerance
    }


def _is_accepted(fate: Fate) -> bool:
    return fate.verdict is Verdict.ACCEPTED


def _action(fate: Fate) -> str:
    if fate.verdict is Verdict.DROPPED:
        return "drop"
    if fate.verdict is Verdict.REJECTED:
        return f"reject {fate.reply.removeprefix('icmp-').removeprefix('icmp6-')}"
    actions = ["dnat" if fate.target else "untouched"]
    actions += ["masq"] if fate.masqueraded else []
    actions += ["affinity"] if fate.remembered else []
    return "+".join(actions)


def _order(socket: str) -> tuple[str, int]:
    return split_socket(socket)
