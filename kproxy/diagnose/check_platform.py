"""Judge the kernel, the privileges of this process, the programs it needs and its limits. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kproxy.diagnose.facts import HostFacts
from kproxy.diagnose.finding import Finding, error, info, passed, warning
from kproxy.model.types import Family

NFTABLES_KERNEL = (5, 13)
"""The oldest kernel with all features of nftables mode."""
RELIABLE_IPTABLES = (1, 8, 4)
"""iptables-nft before this version has bugs that concern Kubernetes (kubernetes/kubernetes#71305)."""
MIN_OPEN_FILES = 1024
"""Each health check node port and each client of a port needs a descriptor."""


def kernel_version(release: str) -> tuple[int, int]:
    """Return the first two numbers of a kernel release such as `6.1.0-18-amd64`, or zeros if it has none."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_platform(facts: HostFacts) -> Iterator[Finding]:
    """Yield the findings about the kernel, privileges, programs and limits."""
    yield from _privileges(facts)
    yield _kernel(facts)
    if not facts.settings.mode_is_set:
        yield info(
            "ModeNotSet",
            f"mode is not set: kproxy uses {facts.settings.mode}; the default becomes nftables in Kubernetes 1.40",
            f"set mode: {facts.settings.mode} (--proxy-mode) to keep it, or mode: nftables",
        )
    yield from _support(facts)
    yield from _iptables(facts)
    yield from _nft(facts)
    yield _open_files(facts)


def _privileges(facts: HostFacts) -> Iterator[Finding]:
    if not facts.net_admin and facts.uid:
        yield info(
            "NotPrivileged",
            "not checked without CAP_NET_ADMIN: rules, other programs' chains, the kernel's support for the mode",
            "run the command as root to check everything",
        )
        return
    if not facts.net_admin:
        yield error(
            "NetAdminMissing",
            "this process is root but has no CAP_NET_ADMIN in its network namespace: kproxy cannot program rules",
            "add the capability NET_ADMIN to the container, and hostNetwork: true to the Pod",
        )
        return
    if _uses_legacy(facts) and not facts.net_raw:
        yield error(
            "NetRawMissing",
            "iptables-legacy needs CAP_NET_RAW, which this process does not have",
            "add the capability NET_RAW to the container",
        )
        return
    yield passed("Privileged", "this process may change rules (CAP_NET_ADMIN)")


def _kernel(facts: HostFacts) -> Finding:
    mode = facts.settings.mode
    if mode == "nftables" and kernel_version(facts.kernel) < NFTABLES_KERNEL:
        return error(
            "KernelTooOld",
            f"Linux {facts.kernel} is too old for nftables mode, which needs 5.13",
            "upgrade the kernel, or use --proxy-mode=iptables",
        )
    return passed("KernelRecent", f"Linux {facts.kernel} is recent enough for {mode} mode")


def _support(facts: HostFacts) -> Iterator[Finding]:
    mode = facts.settings.mode
    for family, reason in facts.support.items():
        if not reason:
            continue
        if family is Family.IPV6 and not facts.support.get(Family.IPV4, "unknown"):
            yield (warning if facts.settings.ipv6 else info)(
                "IPv6Unsupported",
                f"the kernel does not support {mode} mode for IPv6: {reason}",
                f"load the kernel's modules{_modules(facts, family)} and restart kproxy, which skips IPv6 until then",
            )
        else:
            yield error(
                "ModeUnsupported",
                f"the kernel does not support {mode} mode for {family.value}: {reason}",
                f"load the kernel's modules{_modules(facts, family)}, or use another --proxy-mode",
            )
    working = [family.value for family, reason in facts.support.items() if not reason]
    if working:
        yield passed("ModeSupported", f"the kernel supports {mode} mode for {' and '.join(working)}")
    if not facts.ipv6_kernel:
        yield (warning if facts.settings.ipv6 else info)(
            "IPv6Disabled",
            "the kernel has no IPv6 (ipv6.disable=1?): kproxy serves IPv4 only",
            "enable IPv6 in the kernel if the cluster has IPv6 Services",
        )


def _modules(facts: HostFacts, family: Family) -> str:
    if facts.settings.mode == "nftables":
        return " (nf_tables, nft_chain_nat, nft_ct, nft_fib_inet, nft_masq, nft_nat, nft_numgen, nft_reject_inet)"
    if _uses_legacy(facts):
        return " (ip6table_nat)" if family is Family.IPV6 else " (iptable_nat)"
    return " (nf_tables, nft_chain_nat, nft_compat)"


def _iptables(facts: HostFacts) -> Iterator[Finding]:
    found = facts.iptables
    if found is None or facts.settings.mode != "iptables":
        return
    if found.problem:
        yield error(
            "IptablesMissing",
            f"iptables mode needs the program iptables: {found.problem}",
            "install the package iptables, or use --proxy-mode=nftables",
        )
    elif found.variant == "nft" and found.number < RELIABLE_IPTABLES:
        yield warning(
            "IptablesOld",
            f"{found} has bugs that affect Kubernetes",
            "install iptables 1.8.4 or later, or use --proxy-mode=nftables",
        )
    elif found.number < (1, 6, 2):
        yield info(
            "IptablesWithoutRandomFully",
            f"{found} cannot randomize the source ports of masqueraded packets: conflicting ports cause retries",
            "install iptables 1.6.2 or later",
        )
    else:
        yield passed("IptablesUsable", f"{found} is installed")


def _nft(facts: HostFacts) -> Iterator[Finding]:
    if facts.settings.mode != "nftables":
        return
    if facts.nft_version:
        yield passed("NftInstalled", f"{facts.nft_version} is installed")
    else:
        yield info(
            "NftMissing",
            "the program nft is not installed; kproxy uses netlink and does not need it",
            "install the package nftables if you want to look at the rules",
        )


def _open_files(facts: HostFacts) -> Finding:
    if facts.open_files is None or facts.open_files >= MIN_OPEN_FILES:
        limit = "unlimited" if facts.open_files is None else f"{facts.open_files}"
        return passed("OpenFilesSufficient", f"open file limit of {_subject(facts)}: {limit}")
    return warning(
        "OpenFilesLow",
        f"the open file limit of {_subject(facts)} is {facts.open_files}: health check node ports may fail to open",
        "raise it: LimitNOFILE=65536 in a systemd unit, or the default ulimits of the container runtime",
    )


def _subject(facts: HostFacts) -> str:
    return f"kproxy (pid {facts.processes.own[0]})" if facts.processes.own else "this shell"


def _uses_legacy(facts: HostFacts) -> bool:
    found = facts.iptables
    return facts.settings.mode == "iptables" and found is not None and not found.problem and found.variant == "legacy"
