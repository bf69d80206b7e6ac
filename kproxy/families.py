"""The way to the kernel of each IP family: backend and context, for this node and configuration."""

from __future__ import annotations

import logging
import socket
from functools import partial

from kproxy.config import Config, node_name
from kproxy.config.types import PRIMARY
from kproxy.contexts import make_context
from kproxy.host.addresses import local_addresses
from kproxy.host.run import CommandError
from kproxy.iptables.apply import Iptables
from kproxy.iptables.backend import BLOCK_RULES, UNLIMITED, IptablesBackend
from kproxy.model.context import Context
from kproxy.model.types import Family, Node
from kproxy.node import IptablesNode, discover_iptables
from kproxy.sync.family import FamilySync

log = logging.getLogger(__name__)


class StartError(Exception):
    """kproxy cannot work here; the message says why on one line."""


def this_node(config: Config) -> str:
    """Return this node's name: `hostnameOverride`, or the machine's host name."""
    return node_name(config, socket.gethostname())


def follows_addresses(config: Config) -> bool:
    """Return whether rules depend on the addresses of this machine's interfaces."""
    return config.node_port_addresses_in_force not in {(), (PRIMARY,)}


def make_families(config: Config, programs: list[Iptables]) -> dict[Family, FamilySync]:
    """Return the way to the kernel for each family that works here. Raises `StartError` if none does.

    What can be stopped from another thread is added to `programs`.
    """
    try:
        node = discover_iptables()
    except CommandError as error:
        raise StartError(f"iptables mode does not work here: {error}") from None
    families = {}
    for family, version in node.versions.items():
        log.info("%s: %s", family.value, version)
        iptables = Iptables(family)
        programs.append(iptables)
        backend = IptablesBackend(iptables, block_rules=BLOCK_RULES if version.nft else UNLIMITED)
        families[family] = FamilySync(backend, partial(_context, config, family, node))
    return families


def _context(config: Config, family: Family, here: IptablesNode, node: Node | None) -> Context:
    return make_context(
        config,
        family,
        this_node(config),
        node,
        local_addresses() if follows_addresses(config) else (),
        accounting=here.accounting,
        random_fully=here.versions[family].random_fully,
    )
