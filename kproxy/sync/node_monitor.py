"""Check that this machine's Node exists and has the podCIDRs that kproxy needs, and log reminders while it does not."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kproxy.model.log_throttle import LogThrottle
from kproxy.model.store import Store
from kproxy.model.types import Node

log = logging.getLogger(__name__)


class NodeMonitor:
    """Checks the Node in the reconciler's thread. Any thread may read `reason`.

    If `required` is true, the Node must exist. If `needs_pod_cidrs` is true, the Node must exist and have
    `spec.podCIDRs`, and nothing is programmed until it has them for the first time. `on_missing` is called with True
    when the Node is found to be missing, and with False when it exists again.
    """

    def __init__(
        self, name: str, *, required: bool, needs_pod_cidrs: bool, on_missing: Callable[[bool], None] = lambda _: None
    ) -> None:
        self.reason = ""
        """The problem with the Node and how to fix it, on one line, or "" if there is no problem."""
        self._name = name
        self._required = required or needs_pod_cidrs
        self._needs_pod_cidrs = needs_pod_cidrs
        self._on_missing = on_missing
        self._was_missing = False
        self._can_program = not needs_pod_cidrs
        self._reminder = LogThrottle()

    def check(self, store: Store, now: float) -> float | None:
        """Log the problem with the Node if it is new or a reminder is due.

        Returns the number of seconds until the next reminder, or None if there is no problem. `now` is monotonic time
        in seconds.
        """
        missing = self._required and store.node_missing
        if missing != self._was_missing:
            self._was_missing = missing
            self._on_missing(missing)
        reason = self._reason_for(store, missing=missing)
        if reason != self.reason:
            if not reason:
                log.info('Node "%s" exists%s', self._name, " and has podCIDRs" if self._needs_pod_cidrs else "")
            self.reason = reason
            self._reminder.reset()
        if not reason:
            return None
        if self._reminder.is_due(now):
            log.warning("%s", reason)
        return self._reminder.wait(now)

    def _reason_for(self, store: Store, *, missing: bool) -> str:
        if not self._required or not store.has_listed(Node):
            return ""
        has_pod_cidrs = store.node is not None and bool(store.node.pod_cidrs)
        self._can_program = self._can_program or has_pod_cidrs
        if missing:
            if store.node and self._can_program:
                effect = "/healthz returns 503; kproxy keeps its last known zone, addresses and podCIDRs"
                return f'Node "{self._name}" was deleted: {effect}'
            effect = "zone, addresses and podCIDRs are unknown, and /healthz returns 503"
            if not self._can_program:
                effect = "nothing is programmed until it exists and has podCIDRs (detectLocalMode: NodeCIDR)"
            remedy = "if this machine's Node has another name, set --hostname-override (hostnameOverride)"
            return f'Node "{self._name}" not found: {effect}; {remedy}'
        if self._needs_pod_cidrs and not has_pod_cidrs:
            effect = "local pod traffic is not detected" if self._can_program else "nothing is programmed"
            remedy = "set kube-controller-manager --allocate-node-cidrs, or use another detectLocalMode"
            return f'Node "{self._name}" has no podCIDRs (required by detectLocalMode NodeCIDR): {effect}; {remedy}'
        return ""
