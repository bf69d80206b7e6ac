"""Removing rules that nobody keeps up to date any more: all of them, or those of the mode that is not in use."""

from __future__ import annotations

from kproxy.host.run import CommandError
from kproxy.iptables.apply import Iptables, RestoreError
from kproxy.iptables.backend import BLOCK_RULES, UNLIMITED
from kproxy.iptables.cleanup import cleanup
from kproxy.iptables.text import parse_save
from kproxy.model.types import Family
from kproxy.nftables.cleanup import remove_table


def remove_all() -> list[str]:
    """Remove the rules of both modes and both families, kube-proxy's included; say on a line each what was removed.

    Raises `CommandError` if something is there and stays.
    """
    removed = [removed for family in Family if (removed := remove_iptables(family))]
    tables = [f"removed the nftables table of {family.value}" for family in Family if remove_table(family)]
    return removed + tables


def remove_iptables(family: Family) -> str:
    """Remove the rules of iptables mode of a family; say on a line what was removed, or nothing.

    A family for which there is no iptables has none. Raises `CommandError`.
    """
    kernel = Iptables(family)
    try:
        version = kernel.version()
    except CommandError:
        return ""
    with kernel.save() as lines:
        saved = parse_save(lines)
    removed = 0
    try:
        for change in cleanup(saved, block_rules=BLOCK_RULES if version.nft else UNLIMITED):
            kernel.restore(change.text())
            removed += len(change.deleted)
    except RestoreError as error:
        raise CommandError(str(error)) from None
    return f"removed {removed} iptables chains of {family.value}" if removed else ""
