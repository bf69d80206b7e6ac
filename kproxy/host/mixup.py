"""Detecting rules in the iptables variant that we do not write to: the kernel obeys both, and nobody updates those."""

from __future__ import annotations

import sys
from pathlib import Path

from kproxy.host.run import CommandError, run

TIMEOUT_SECONDS = 60

LEGACY_TABLES = (Path("/proc/thread-self/net/ip_tables_names"), Path("/proc/thread-self/net/ip6_tables_names"))
"""What legacy tables exist. To look into one that does not would create it, and its hooks."""


def other_variant_rules(*, ours_is_nft: bool) -> str:
    """Return one line about Services' rules in the other variant of iptables, or "" if there are none to be seen."""
    return _in_legacy() if ours_is_nft else _in_nft()


def _in_legacy() -> str:
    if not any("nat" in _read(path).split() for path in LEGACY_TABLES):
        return ""
    try:
        done = run([sys.executable, "-m", "kproxy.host.legacy_chains"], timeout=TIMEOUT_SECONDS)
    except CommandError:
        return ""
    chains = done.stdout.splitlines()
    if not chains:
        return ""
    return (
        f"iptables-legacy holds {len(chains)} KUBE- chains beside the rules of iptables-nft, which is in use here: "
        "the kernel obeys both; use one variant throughout"
    )


def _in_nft() -> str:
    for family in ("ip", "ip6"):
        try:
            done = run(["nft", "list", "chain", family, "nat", "KUBE-SERVICES"], timeout=TIMEOUT_SECONDS)
        except CommandError:
            return ""
        if done.code == 0:
            return (
                f"iptables-nft holds KUBE-SERVICES in table {family} nat beside the rules of iptables-legacy, which is "
                "in use here: the kernel obeys both; use one variant throughout"
            )
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
