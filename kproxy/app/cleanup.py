"""Removing what nobody keeps up to date any more: everything, or what modes that are not in use left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

from kproxy.host.commands import CommandError
from kproxy.iptables.backend import MAX_TRANSACTION_RULES, UNLIMITED
from kproxy.iptables.cleanup import cleanup, cleanup_ipvs
from kproxy.iptables.names import PORT_CHAIN_PREFIXES, ChainName
from kproxy.iptables.runner import IptablesRunner, IptablesVersion, RestoreError
from kproxy.iptables.save_restore import RestoreInput, SavedChain, parse_save
from kproxy.iptables.variant import other_variant_warning
from kproxy.ipvs.cleanup import find_leftovers, remove_leftovers
from kproxy.model.types import Family
from kproxy.nftables.kernel import remove_table

log = logging.getLogger(__name__)
_RULES_OF_PORTS = tuple(f"-A {prefix}" for prefix in PORT_CHAIN_PREFIXES)
"""How the lines begin that are most of a dump. What is in a chain does not matter if all of it goes."""


class VirtualServersRemainError(CommandError):
    """Virtual servers of ipvs mode cannot be removed; their interface and ipsets, which tell whose they are, stay."""


def remove_all() -> Iterator[str]:
    """Remove the rules of all modes and both families, kube-proxy's included; yield a line about each when it is gone.

    What cannot be seen, and so neither be removed, is warned about. Raises `CommandError` if something is there
    and stays.
    """
    for family in Family:
        if removed := remove_iptables(family):
            yield removed
    for family in Family:
        if remove_table(family):
            yield f"removed the nftables table of {family.value}"
    if warning := out_of_reach():
        log.warning("%s", warning)
    if ipvs := _remove_ipvs_objects():
        yield f"removed {ipvs} of ipvs mode"


def remove_iptables(family: Family) -> str:
    """Remove the rules of iptables mode of a family; say on a line what was removed, or nothing.

    A family for which there is no iptables has none. A table that iptables cannot show is warned about. Raises
    `CommandError`. With 20,000 chains it takes 1.6 s (iptables-nft 1.8.9), with 55,000 5.3 s. It should not run beside
    somebody who changes tables all the time: iptables-nft begins to read anew at each change, and may never end.
    """

    def changes(saved: Mapping[ChainName, SavedChain], version: IptablesVersion) -> Iterable[RestoreInput]:
        return cleanup(saved, max_transaction_rules=MAX_TRANSACTION_RULES if version.nft else UNLIMITED)

    removed = _remove_chains(family, changes)
    return f"removed {_chains(removed, family)}" if removed else ""


def remove_ipvs() -> str:
    """Remove what kube-proxy's ipvs mode left, once rules of ours are in place; say on a line what, or nothing.

    What cannot be removed is warned about. Chains that ipvs mode shares with iptables mode are not looked at: in
    iptables mode they are ours by now, in nftables mode `remove_iptables` takes them. Raises `CommandError` if
    iptables fails, `VirtualServersRemainError` if virtual servers stay.
    """
    try:
        if not find_leftovers():
            return ""
    except OSError as error:
        log.debug("cannot look for what ipvs mode left: %s", error.strerror)
        return ""
    counts = {family: _remove_chains(family, lambda saved, _: [cleanup_ipvs(saved)]) for family in Family}
    removed = [_chains(number, family) for family, number in counts.items() if number]
    try:
        objects = _remove_ipvs_objects()
    except VirtualServersRemainError:
        if removed:
            log.info("removed of what ipvs mode left: %s", ", ".join(removed))
        raise
    if objects:
        removed.append(objects)
    return f"removed what ipvs mode left: {', '.join(removed)}" if removed else ""


def _remove_ipvs_objects() -> str:
    """Remove what ipvs mode left beside its rules; say what was removed, and warn about what was not.

    Raises `VirtualServersRemainError` if virtual servers stay.
    """
    try:
        done = remove_leftovers(find_leftovers())
    except OSError as error:
        log.warning("cannot look for what ipvs mode left: %s", error.strerror)
        return ""
    if done.servers_remain:
        if done.removed:
            log.info("removed %s of ipvs mode", ", ".join(done.removed))
        raise VirtualServersRemainError(f"{'; '.join(done.problems)}; its interface and its ipsets stay as well")
    for problem in done.problems:
        log.warning("%s", problem)
    return ", ".join(done.removed)


def _chains(number: int, family: Family) -> str:
    return f"{number} iptables chains of {family.value}"


def _remove_chains(
    family: Family, plan: Callable[[Mapping[ChainName, SavedChain], IptablesVersion], Iterable[RestoreInput]]
) -> int:
    """Make the changes that a plan finds in what a family has now; return how many chains were deleted by them."""
    kernel = IptablesRunner(family)
    version = _version(kernel)
    if version is None:
        return 0
    with kernel.save() as lines:
        needed = (line for line in lines if not line.startswith(_RULES_OF_PORTS))
        saved = parse_save(needed)
    for table in sorted(saved.incompatible):
        log.warning(
            "%s: table %s holds rules that only nft can show: chains of iptables mode may be left there",
            family.value,
            table,
        )
    try:
        changes = [change for change in plan(saved.chains, version) if change]
        kernel.restore_each(change.text() for change in changes)
    except RestoreError as error:
        raise CommandError(str(error)) from None
    return sum(len(change.deleted) for change in changes)


def out_of_reach() -> str:
    """Return one line about Services' rules that `remove_iptables` does not see, or "" if there are none.

    That is those of the variant of iptables which is not in use here, or of both if there is no iptables.
    """
    used = _version(IptablesRunner(Family.IPV4))
    found = [
        f"iptables-{name}"
        for name, is_nft in (("legacy", False), ("nft", True))
        if (used is None or used.nft is not is_nft) and other_variant_warning(uses_nft=not is_nft)
    ]
    if not found:
        return ""
    here = f"in use here is {used}" if used else "there is no iptables here"
    return f"KUBE- chains of {' and '.join(found)} are still there and cannot be removed: {here}"


def _version(kernel: IptablesRunner) -> IptablesVersion | None:
    try:
        return kernel.version()
    except CommandError:
        return None
