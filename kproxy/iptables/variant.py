"""Select the iptables variant of the host (nft or legacy), and warn about Service rules in the other variant."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal, TypeAlias

from kproxy.host.commands import CommandError, CommandRunner, run

Variant: TypeAlias = Literal["nft", "legacy"]
FOLDER_VARIABLE = "KPROXY_IPTABLES"
"""Environment variable that names the folder with the programs of both variants: `nft/iptables`,
`legacy/iptables-save` etc.
"""
KUBELET_CHAINS = ("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
"""Chains in table mangle that reveal which variant the kubelet uses. KEP-3178 introduced KUBE-IPTABLES-HINT for this
purpose. Older kubelets create only KUBE-KUBELET-CANARY.
"""
LEGACY_TABLE_FILES = {
    "iptables": Path("/proc/thread-self/net/ip_tables_names"),
    "ip6tables": Path("/proc/thread-self/net/ip6_tables_names"),
}
"""The files that list the existing legacy tables. Running iptables-legacy instead would create missing tables and
register their hooks.
"""
TIMEOUT_SECONDS = 60
"""Time limit for each program that this module runs."""
_VARIANTS: tuple[Variant, ...] = ("nft", "legacy")


# Selecting the host's variant.


def use_host_variant(environment: MutableMapping[str, str]) -> Variant | None:
    """Put the folder with the programs of the host's variant first in PATH, and return the variant.

    `environment` is the environment of this process, which child processes inherit. If `FOLDER_VARIABLE` is not set,
    return None and change nothing.
    """
    folder = environment.get(FOLDER_VARIABLE)
    if not folder:
        return None
    variant = detect_variant(Path(folder))
    environment["PATH"] = os.pathsep.join([str(Path(folder, variant)), environment.get("PATH", os.defpath)])
    return variant


def detect_variant(folder: Path) -> Variant:
    """Return the variant that the kubelet uses.

    If neither variant has a chain of the kubelet, return the variant with more rules, or nft if both have the same
    number of rules. kubernetes-sigs/iptables-wrappers makes the same decision. `folder` contains the programs of both
    variants. A variant whose programs cannot be run counts as unused.
    """
    for variant in _VARIANTS:
        if any(
            _has_mangle_chain(folder, variant, program, chain)
            for program in LEGACY_TABLE_FILES
            for chain in KUBELET_CHAINS
        ):
            return variant
    legacy = sum(_count_rules(folder, "legacy", program) for program in LEGACY_TABLE_FILES)
    if not legacy:
        return "nft"
    nft = sum(_count_rules(folder, "nft", program) for program in LEGACY_TABLE_FILES)
    return "legacy" if legacy > nft else "nft"


def _has_mangle_chain(folder: Path, variant: Variant, program: str, chain: str) -> bool:
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


# Detecting Service rules in the other variant.


def other_variant_warning(*, uses_nft: bool) -> str:
    """Return a one-line warning if the variant that kproxy does not use has Service rules, or "" if none are found.

    `uses_nft` is true if kproxy uses iptables-nft.
    """
    return _legacy_warning() if uses_nft else _nft_warning()


def _legacy_warning() -> str:
    if not any("nat" in _legacy_tables(program) for program in LEGACY_TABLE_FILES):
        return ""
    try:
        done = run([sys.executable, "-m", "kproxy.iptables.legacy_chains"], timeout=TIMEOUT_SECONDS)
    except CommandError:
        return ""
    chains = done.stdout.splitlines()
    if not chains:
        return ""
    return (
        f"iptables-legacy has KUBE- chains ({len(chains)}), but kproxy uses iptables-nft: the kernel applies the rules "
        "of both; use the same variant for all programs on this node"
    )


def _nft_warning() -> str:
    for table_family in ("ip", "ip6"):
        try:
            done = run(["nft", "list", "chain", table_family, "nat", "KUBE-SERVICES"], timeout=TIMEOUT_SECONDS)
        except CommandError:
            return ""
        if done.code == 0:
            return (
                f"iptables-nft has the chain KUBE-SERVICES in table {table_family} nat, but kproxy uses "
                "iptables-legacy: the kernel applies the rules of both; use the same variant for all programs on this "
                "node"
            )
    return ""


def _legacy_tables(program: str) -> list[str]:
    """Return the names of the existing legacy tables of `iptables` or `ip6tables`."""
    try:
        return LEGACY_TABLE_FILES[program].read_text().split()
    except OSError:
        return []
