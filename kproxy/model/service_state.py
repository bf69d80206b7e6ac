"""What the daemon knows about one Service, as the control socket reports it. Pure."""

from __future__ import annotations

from msgspec import Struct

from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan
from kproxy.model.types import EndpointSlice, Family, Node, Service, ServiceKey


class FamilyServiceState(Struct, frozen=True):
    """The state of a Service in one IP family.

    `context` is the one of the last successful sync, or None before it. `plans` are the plans for the current objects
    in this context; the daemon leaves it to the client to compute them. `pending` is true if a change of the Service
    has not been programmed yet. `quarantined` is the reason why the kernel rejected the rules of the Service, on one
    line, or "". `failure` is the reason why the last sync of the family failed, or "" if it succeeded;
    `failing_seconds` is the time since the first of these failures.
    """

    context: Context | None
    plans: tuple[ServicePortPlan, ...] = ()
    pending: bool = False
    quarantined: str = ""
    failure: str = ""
    failing_seconds: float = 0.0


class ServiceState(Struct, frozen=True):
    """The state of a Service on this node.

    `service` is None if the daemon has no such Service, or if it does not serve it, for example because the Service is
    headless. `invalid` is true if the current object cannot be used; `service` is then the last usable version.
    `complete` is false as long as the daemon has not received all objects. `iptables_dispatch_threshold` is the setting
    of the daemon.
    """

    key: ServiceKey
    mode: str
    node_name: str
    node: Node | None
    complete: bool
    service: Service | None
    invalid: bool
    slices: tuple[EndpointSlice, ...]
    families: dict[Family, FamilyServiceState]
    iptables_dispatch_threshold: int = 0


class FamilyWaiting(Struct, frozen=True):
    """The Services of one family that the kernel does not have as they are.

    `pending` are those with changes that have not been programmed, and `quarantined` those that the kernel rejected,
    with the reasons.
    """

    pending: tuple[ServiceKey, ...]
    quarantined: dict[ServiceKey, str]
