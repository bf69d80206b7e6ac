"""Make the contexts of an IP family from the configuration and from what this node has."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kproxy.app.family_contexts import local_traffic_warning, make_context
from kproxy.app.localhost_node_ports import wants_localhost_proxy
from kproxy.app.node_port_addresses import depends_on_interfaces, node_port_warning
from kproxy.app.node_settings import local_node_name
from kproxy.config import Config
from kproxy.host.interfaces import local_addresses
from kproxy.model.context import Context
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family, Node
from kproxy.nftables.probe import matches_sockets

log = logging.getLogger(__name__)


class ContextFactory:
    """Makes the contexts of one family and warns about settings that this node cannot satisfy."""

    def __init__(
        self,
        config: Config,
        family: Family,
        *,
        accounting: Callable[[], bool],
        random_fully: bool,
        has_proxy: bool = False,
    ) -> None:
        """`accounting` returns whether nfacct counters are available. It is called for each context.

        `has_proxy` is true if this process can serve NodePorts on loopback addresses in nftables mode.
        """
        self._config = config
        self._family = family
        self._accounting = accounting
        self._random_fully = random_fully
        self._has_proxy = has_proxy and wants_localhost_proxy(config, family)
        self._warnings: tuple[str, ...] = ()

    def make(self, node: Node | None) -> Context:
        """Return the context that results from this Node (None if unknown) and from the node's current addresses.

        Raises `SyncError` if the node's addresses cannot be read from the kernel. Logs each warning when it starts to
        apply, and not again while it continues to apply.
        """
        config = self._config
        try:
            addresses = local_addresses() if depends_on_interfaces(config) else ()
        except OSError as error:
            raise SyncError(f"cannot read the addresses of this machine: {error.strerror or error}") from error
        context = make_context(
            config,
            self._family,
            local_node_name(config),
            node,
            addresses,
            accounting=self._accounting(),
            random_fully=self._random_fully,
            has_proxy=self._has_proxy,
            can_hold=self._has_proxy and matches_sockets(self._family),
        )
        warnings = (node_port_warning(config, node, context), local_traffic_warning(config, node, context))
        for warning in warnings:
            if warning and warning not in self._warnings:
                log.warning("%s", warning)
        self._warnings = warnings
        return context
