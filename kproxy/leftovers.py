"""Removing rules that nobody keeps up to date any more: all of them, or those of the mode that is not in use."""

from __future__ import annotations

import logging

from kproxy.host.mixup import other_variant_rules
from kproxy.host.run import CommandError
from kproxy.iptables.apply import Iptables, IptablesVersion, RestoreError
from kproxy.iptables.backend import BLOCK_RULES, UNLIMITED
from kproxy.iptables.cleanup import cleanup
from kproxy.iptables.names import PORT_CHAIN_PREFIXES
from kproxy.iptables.text import parse_save
from kproxy.model.types import Family
from kproxy.nftables.cleanup import remove_table

log = logging.getLogger(__name__)

_RULES_OF_PORTS = tuple(f"-A {prefix}" for prefix in PORT_CHAIN_PREFIXES)
"""How the lines begin that are most of a dump. What is in a chain does not matter if all of it goes."""


def remove_all() -> list[str]:
    """Remove the rules of both modes and both families, kube-proxy's included; say on a line each what was removed.

    What cannot be seen, and so neither be removed, is warned about. Raises `CommandError` if something is there
    and stays.
    """
    removed = [removed for family in Family if (removed := remove_iptables(family))]
    tables = [f"removed the nftables table of {family.value}" for family in Family if remove_table(family)]
    if warning := out_of_reach():
        log.warning("%s", warning)
    return removed + tables


def remove_iptables(family: Family) -> str:
    """Remove the rules of iptables mode of a family; say on a line what was removed, or nothing.

    A family for which there is no iptables has none. A table that iptables cannot show is warned about. Raises
    `CommandError`. With 20,000 chains it takes 1.6 s (iptables-nft 1.8.9), with 55,000 5.3 s. It should not run beside
    somebody who changes tables all the time: iptables-nft begins to read anew at each change, and may never end.
    """
    kernel = Iptables(family)
    version = _version(kernel)
    if version is None:
        return ""
    incompatible: set[str] = set()
    with kernel.save() as lines:
        needed = (line for line in lines if not line.startswith(_RULES_OF_PORTS))
        saved = parse_save(needed, incompatible=incompatible)
    for table in sorted(incompatible):
        log.warning(
            "%s: table %s holds rules that only nft can show: chains of iptables mode may be left there",
            family.value,
            table,
        )
    try:
        changes = list(cleanup(saved, block_rules=BLOCK_RULES if version.nft else UNLIMITED))
        kernel.restore_each(change.text() for change in changes)
    except RestoreError as error:
        raise CommandError(str(error)) from None
    removed = sum(len(change.deleted) for change in changes)
    return f"removed {removed} iptables chains of {family.value}" if removed else ""


def out_of_reach() -> str:
    """Return one line about Services' rules that `remove_iptables` does not see, or "" if there are none.

    That is those of the variant of iptables which is not in use here, or of both if there is no iptables.
    """
    used = _version(Iptables(Family.IPV4))
    found = [
        f"iptables-{name}"
        for name, is_nft in (("legacy", False), ("nft", True))
        if (used is None or used.nft is not is_nft) and other_variant_rules(ours_is_nft=not is_nft)
    ]
    if not found:
        return ""
    here = f"in use here is {used}" if used else "there is no iptables here"
    return f"KUBE- chains of {' and '.join(found)} are still there and cannot be removed: {here}"


def _version(kernel: Iptables) -> IptablesVersion | None:
    try:
        return kernel.version()
    except CommandError:
        return None
