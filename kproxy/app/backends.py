"""Build the backend of each IP family that works on this node."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from kproxy.app.candidate_families import has_family
from kproxy.app.family_contexts import interface_warning
from kproxy.app.own_commits import OwnCommits
from kproxy.config import Config
from kproxy.host.commands import CommandError
from kproxy.host.process import has_net_admin
from kproxy.iptables.runner import IptablesRunner, check_tables
from kproxy.model.types import Family
from kproxy.nftables.probe import NftablesUnsupportedError, choose_commit
from kproxy.sync.family_sync import FamilySync

if TYPE_CHECKING:
    from kproxy.app.localhost_listeners import Listeners

log = logging.getLogger(__name__)


class StartError(Exception):
    """kproxy cannot run on this node. The message gives the reason on one line."""


def check_privileges() -> None:
    """Raise `StartError` unless this process may change the rules of its network namespace."""
    if not has_net_admin():
        raise StartError(
            "missing capability CAP_NET_ADMIN in this network namespace: run as root or grant it to the process"
        )


def make_families(
    config: Config,
    runners: list[IptablesRunner],
    own: OwnCommits | None = None,
    on_progress: Callable[[Family], object] = lambda _: None,
    listeners: Listeners | None = None,
) -> dict[Family, FamilySync]:
    """Build the `FamilySync` of each IP family that works on this node. Raises `StartError` if none works.

    In iptables mode, appends the iptables runners to `runners`, so that another thread can stop them. Adds to `own`
    what is needed to watch the tables. While a sync of a family is running, `on_progress` is called each time the
    kernel or iptables has accepted a part of it. `listeners` serves NodePorts on loopback addresses. Logs a warning if
    no interface of the node matches `detectLocal`.
    """
    own = own or OwnCommits()
    if warning := interface_warning(config, [name for _, name in socket.if_nameindex()]):
        log.warning("%s", warning)
    mode = config.effective_mode
    try:
        # Import only the modules of this mode: the others would cost a megabyte.
        if mode == "iptables":
            from kproxy.app.iptables_families import iptables_families  # noqa: PLC0415 - as above

            return iptables_families(config, runners, own, on_progress)
        from kproxy.app.nftables_families import nftables_families  # noqa: PLC0415 - as above

        return nftables_families(config, own, on_progress, listeners)
    except (CommandError, NftablesUnsupportedError) as error:
        raise StartError(f"{mode} mode does not work on this node: {error}") from None


def probe_family(mode: str, family: Family) -> None:
    """Return if a family works on this node in a mode, "iptables" or "nftables".

    Otherwise, raises `CommandError` or `NftablesUnsupportedError`.
    """
    if not has_family(family):
        raise CommandError(f"the kernel does not support {family.value}")
    if mode == "iptables":
        check_tables(family, IptablesRunner(family).version())
    else:
        choose_commit(family)
