"""The facts from which `kproxy explain` concludes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from msgspec import Struct, field

from kproxy.diagnose.cluster_objects import ClusterObjects
from kproxy.diagnose.explain_report import ExplainSource
from kproxy.model.addresses import socket_text
from kproxy.model.context import Context
from kproxy.model.plan import ServicePortPlan, plan_service
from kproxy.model.service_state import FamilyServiceState, ServiceState
from kproxy.model.types import EndpointSlice, Family, Node, Protocol, Service, ServiceKey


class KernelDifference(Struct, frozen=True):
    """A part of the rules in the kernel that is not as planned."""

    family: Family
    object: str
    problem: str


class KernelFacts(Struct, frozen=True):
    """What the kernel has for a Service.

    `compared` are the families whose rules were compared. `absent` are those of them in which the kernel has no rules
    of kproxy at all. `summary` names what was compared. `owners` maps frontends of the Service, as `FrontendConflict`
    names them, to the service ports of other Services to which they belong in the kernel.
    """

    compared: tuple[Family, ...] = ()
    absent: tuple[Family, ...] = ()
    differences: tuple[KernelDifference, ...] = ()
    summary: str = ""
    owners: dict[str, str] = field(default_factory=dict)


class RulesComparison(Struct):
    """The result of comparing the rules of a Service in one family; see `KernelFacts`."""

    summary: str = ""
    differences: list[KernelDifference] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)


class TrackedFlow(Struct, frozen=True):
    """Tracked connections from any clients to one frontend, which one address answers.

    `frontend` is the frontend of the plan, `IP:port` or `:port` for a NodePort. `stale` means that new connections
    would not be sent to this address.
    """

    family: Family
    protocol: Protocol
    frontend: str
    endpoint: str
    count: int
    stale: bool


class Facts(Struct, frozen=True, dict=True):
    """Everything that is known about a Service on a node.

    `contexts` are the contexts of the families of this node. `objects` is None if neither files nor the API server
    could be read; `live` is true if they come from the API server. `daemon` is None if no daemon answered. `sources`
    says what was read, and what could not be.
    """

    key: ServiceKey
    mode: str
    node_name: str
    contexts: dict[Family, Context]
    objects: ClusterObjects | None = None
    live: bool = False
    daemon: ServiceState | None = None
    kernel: KernelFacts | None = None
    flows: tuple[TrackedFlow, ...] = ()
    sources: tuple[ExplainSource, ...] = ()

    @cached_property
    def node(self) -> Node | None:
        """The Node object of this node, if it is known."""
        known = next((each for each in self.nodes if each.name == self.node_name), None)
        return known or (self.daemon.node if self.daemon else None)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All Nodes that are known."""
        return (self.objects.nodes or ()) if self.objects else ()

    @cached_property
    def service(self) -> Service | None:
        """The Service as it gets rules, or None if it gets none or does not exist.

        The object of the cluster is preferred: the daemon may not have received it yet.
        """
        if self.objects is not None:
            return self.objects.service(self.key)
        return self.daemon.service if self.daemon else None

    @cached_property
    def slices(self) -> tuple[EndpointSlice, ...]:
        """The EndpointSlices of the Service that kproxy uses."""
        if self.objects is not None and self.objects.slices is not None:
            return tuple(each.decoded for each in self.objects.slices_of(self.key) if each.decoded is not None)
        return self.daemon.slices if self.daemon else ()

    def context(self, family: Family) -> Context:
        """Return the context of a family: that of the daemon's last sync if there is one."""
        state = self.family_state(family)
        if state is not None and state.context is not None:
            return state.context
        return self.contexts.get(family) or Context(family, self.node_name)

    def family_state(self, family: Family) -> FamilyServiceState | None:
        """Return what the daemon says about the Service in a family."""
        return self.daemon.families.get(family) if self.daemon else None

    def plans(self) -> dict[Family, tuple[ServicePortPlan, ...]]:
        """Return the plans of the Service in each family in which it has a ClusterIP."""
        service = self.service
        if service is None:
            return {}
        planned = {family: plan_service(service, self.slices, self.context(family)) for family in Family}
        return {family: plans for family, plans in planned.items() if plans}

    def other_plans(self, family: Family) -> Iterator[ServicePortPlan]:
        """Yield the plans of the other Services that claim one of the frontends of this Service."""
        service, objects = self.service, self.objects
        if service is None or objects is None:
            return
        own = set(claims(service))
        for other in objects.services:
            if other.key != self.key and not own.isdisjoint(claims(other)):
                slices = [each.decoded for each in objects.slices_of(other.key) if each.decoded is not None]
                yield from plan_service(other, slices, self.context(family))


def claims(service: Service) -> Iterator[tuple[str, Protocol]]:
    """Yield the frontends that a Service claims: `IP:port`, or `:port` for a NodePort, with the protocol."""
    for port in service.ports:
        addresses: Iterable[str] = (*service.cluster_ips, *service.external_ips, *service.vips)
        yield from ((socket_text(address, port.port), port.protocol) for address in addresses)
        if port.node_port:
            yield socket_text("", port.node_port), port.protocol
