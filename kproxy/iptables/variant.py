"""The iptables variant in use, nft or legacy, and rules that were left in the other one."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal, TypeAlias

from kproxy.host.commands import CommandError, CommandRunner, run

Variant: TypeAlias = Literal["nft", "legacy"]
FOLDER = "KPROXY_IPTABLES"
"""The environment variable with the folder that holds `nft/iptables`, `legacy/iptables-save` and so on."""
KUBELET_CHAINS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
"""What the kubelet keeps in table mangle so that others can tell its variant (KEP-3178), and what older ones do."""
LEGACY_TABLES = {
    "iptables": Path("/proc/thread-self/net/ip_tables_names"),
    "ip6tables": Path("/proc/thread-self/net/ip6_tables_names"),
}
"""What legacy tables exist. To ask iptables-legacy for one that does not would create it, and its hooks."""
TIMEOUT_SECONDS = 60


def use_host_variant(environment: MutableMapping[str, str]) -> Variant | None:
    """Put the host's variant first in PATH, and return it; None where no folder with both is named.

    `environment` is that of this process, which programs started later inherit.
    """
    folder = environment.get(FOLDER)
    if not folder:
        return None
    variant = detect_variant(Path(folder))
    environment["PATH"] = os.pathsep.join([str(Path(folder, variant)), environment.get("PATH", os.defpath)])
    return variant


def detect_variant(folder: Path) -> Variant:
    """Return the variant that the kubelet uses; if it has left no sign, the one with more rules, and nft if none has.

    `folder` holds the programs of both. One that cannot be run counts as not in use.
    """
    for variant in _VARIANTS:
        if any(_has_chain(folder, variant, program, chain) for program in LEGACY_TABLES for chain in KUBELET_CHAINS):
            return variant
    legacy = sum(_count_rules(folder, "legacy", program) for program in LEGACY_TABLES)
    if not legacy:
        return "nft"
    return "legacy" if legacy > sum(_count_rules(folder, "nft", program) for program in LEGACY_TABLES) else "nft"


_VARIANTS: tuple[Variant, ...] = ("nft", "legacy")


def _has_chain(folder: Path, variant: Variant, program: str, chain: str) -> bool:
    if variant == "legacy" and "mangle" not in _legacy_tables(program):
        return False
    argv = [str(folder / variant / program), "-w", "-t", "mangle", "-S", chain]
    try:
        return run(argv, timeout=TIMEOUT_SECONDS).code == 0
    except CommandError:
        return False


def _count_rules(folder: Path, variant: Variant, program: str) -> int:
    try:
        with CommandRunner().stream_output(
            [str(folder / variant / f"{program}-save")], timeout=TIMEOUT_SECONDS
        ) as lines:
            return sum(line.startswith("-A ") for line in lines)
    except CommandError:
        return 0


def _legacy_tables(program: str) -> list[str]:
    try:
        return LEGACY_TABLES[program].read_text().split()
    except OSError:
        return []


def rules_in_other_variant(*, ours_is_nft: bool) -> str:
    """Return one line about Services' rules in the other variant of iptables, or "" if there are none to be seen."""
    return _in_legacy() if ours_is_nft else _in_nft()


def _in_legacy() -> str:
    if not any("nat" in _read(path).split() for path in LEGACY_TABLES.values()):
        return ""
    try:
        done = run([sys.executable, "-m", "kproxy.iptables.legacy_chains"], timeout=TIMEOUT_SECONDS)
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
