"""A backend that also keeps the listeners of NodePorts on the loopback address in step with the rules it programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from kproxy.model.context import Context
from kproxy.model.drift import RepairResult, Touched
from kproxy.model.localhost_node_ports import LocalhostListener, localhost_listeners
from kproxy.model.plan import ServicePortPlan
from kproxy.model.sync_report import ApplyResult, Plans
from kproxy.model.types import Family, ServiceKey
from kproxy.sync.family_sync import Backend


class Listeners(Protocol):
    """What `kproxy.serve.localhost_proxy.LocalhostProxy` offers to a backend."""

    def set_listener(self, family: Family, wanted: LocalhostListener) -> None:
        """Open a listener, or change the endpoints and the affinity of an open one."""

    def remove_listener(self, family: Family, port: int) -> None:
        """Close a listener and its connections."""


class ListeningBackend:
    """Opens and closes the listeners of one IP family. Everything else is left to another backend.

    A listener is open before the kernel gets rules for its NodePort. It is closed after a sync that has removed these
    rules, so that a failed sync closes nothing.
    """

    def __init__(self, backend: Backend, family: Family, listeners: Listeners) -> None:
        self._backend = backend
        self._family = family
        self._listeners = listeners
        self._claims: dict[int, dict[ServiceKey, LocalhostListener]] = {}
        self._ports: dict[ServiceKey, tuple[int, ...]] = {}
        self._unclaimed: set[int] = set()

    @property
    def needs_full_sync(self) -> bool:
        """See `Backend`."""
        return self._backend.needs_full_sync

    def sync(self, plans: Plans, context: Context) -> ApplyResult:
        """See `Backend`."""
        result = self._backend.sync(_ObservedPlans(plans, self), context)
        for port in self._unclaimed:
            self._listeners.remove_listener(self._family, port)
        self._unclaimed.clear()
        return result

    def forget(self) -> None:
        """See `Backend`."""
        self._backend.forget()

    def repair(self, touched: Mapping[str, Touched], plans: Plans, context: Context) -> RepairResult:
        """See `Backend`."""
        return self._backend.repair(touched, plans, context)

    def compare_next(self, plans: Plans, context: Context) -> RepairResult | None:
        """See `Backend`."""
        return self._backend.compare_next(plans, context)

    def observe(self, key: ServiceKey, plans: Iterable[ServicePortPlan]) -> None:
        """Open the listeners that a Service needs now. Note the ones that it no longer needs."""
        wanted = {each.port: each for each in localhost_listeners(plans)}
        for port in self._ports.pop(key, ()):
            if port not in wanted:
                claims = self._claims[port]
                del claims[key]
                if claims:
                    self._set(port)
                else:
                    del self._claims[port]
                    self._unclaimed.add(port)
        for port, listener in wanted.items():
            self._claims.setdefault(port, {})[key] = listener
            self._unclaimed.discard(port)
            self._set(port)
        if wanted:
            self._ports[key] = tuple(wanted)

    def _set(self, port: int) -> None:
        """If several Services claim a port, which the API server does not allow, the first one by name owns it."""
        self._listeners.set_listener(self._family, min(self._claims[port].items())[1])


class _ObservedPlans:
    """Plans that a `ListeningBackend` sees before the backend that it wraps."""

    def __init__(self, plans: Plans, observer: ListeningBackend) -> None:
        self._plans = plans
        self._observer = observer

    def by_service(self) -> Iterator[tuple[ServiceKey, Sequence[ServicePortPlan]]]:
        """See `Plans`."""
        for key, plans in self._plans.by_service():
            self._observer.observe(key, plans)
            yield key, plans

    def of(self, key: ServiceKey) -> Sequence[ServicePortPlan]:
        """See `Plans`."""
        return self._plans.of(key)
