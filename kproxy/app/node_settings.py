"""What follows from the configuration of this node alone."""

from __future__ import annotations

import socket

from kproxy.config import Config, node_name
from kproxy.model.delta import BASIC_KINDS, Kind
from kproxy.model.types import ServiceCIDR


def local_node_name(config: Config) -> str:
    """Return this node's name: `hostnameOverride`, or else the host name."""
    return node_name(config, socket.gethostname())


def watched_kinds(config: Config) -> tuple[Kind, ...]:
    """Return the kinds of objects that the rules depend on."""
    return (*BASIC_KINDS, ServiceCIDR) if config.effective_mode == "nftables" else BASIC_KINDS
