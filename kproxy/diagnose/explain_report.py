"""The report of `kproxy explain`: whether a Service works, why it does not, and what to do. Pure."""

from __future__ import annotations

from typing import Literal, TypeAlias

from kproxy.diagnose.report import Report, ReportPart
from kproxy.model.types import Protocol

Verdict: TypeAlias = Literal["WORKS", "REJECTED", "DROPPED", "DEGRADED", "NOT PROGRAMMED"]
ReasonCode: TypeAlias = Literal[
    "NoSuchService",
    "WrongNamespace",
    "InvalidObject",
    "ManagedElsewhere",
    "ExternalName",
    "Headless",
    "ClusterIPPending",
    "Quarantined",
    "NotSyncedYet",
    "NoEndpoints",
    "SelectorMatchesNothing",
    "TargetPortUnresolved",
    "PodsNotReady",
    "NoReadyEndpoints",
    "OnlyTerminating",
    "NoLocalEndpoints",
    "FamilyMissing",
    "SourceNotAllowed",
    "ReachedOnlyFromInside",
    "PortConflict",
    "AddressConflict",
    "Drifted",
    "StaleConntrack",
    "NodePortNotOnThisAddress",
    "LoadBalancerPending",
    "EndpointSlicesOutOfDate",
]
"""Why a Service does not work, or not completely. A code never changes its meaning."""
NoteCode: TypeAlias = Literal[
    "NetworkPolicyPresent",
    "TargetPortNotDeclared",
    "PodsWithoutPort",
    "SomeEndpointsNotReady",
    "HintsNotUsed",
    "HintsExcludeThisNode",
    "EndpointSlicesOutOfDate",
    "SourceRangesIgnored",
    "SourceRangesWithoutLoadBalancer",
    "NodePortNotOnThisAddress",
    "OwnsContestedFrontend",
    "InvalidEndpoints",
    "ServiceBeingDeleted",
    "NodeUnknown",
    "LoadBalancerBypassesNode",
    "ClusterIPOfNode",
]
"""What is worth knowing about a Service, although it is not why the Service does not work."""
EndpointState: TypeAlias = Literal[
    "Ready",
    "ServingWhileTerminating",
    "NotReady",
    "Terminating",
    "OnOtherNode",
    "InOtherZone",
    "ForOtherNode",
    "OtherFamily",
    "PortNotInSlice",
    "Duplicate",
    "InvalidAddress",
    "SliceIgnored",
]
"""Why this node uses an endpoint (the first two), or why it does not."""
Outcome: TypeAlias = Literal["forwarded", "rejected", "dropped", "not programmed", "owned by another Service"]
FrontendKind: TypeAlias = Literal["ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"]


class Reason(ReportPart, frozen=True, kw_only=True):
    """Why a Service or one of its ports does not work: a stable code, one sentence, further lines, and what to do."""

    code: ReasonCode
    message: str
    details: tuple[str, ...] = ()
    fix: str = ""


class ExplainNote(ReportPart, frozen=True, kw_only=True):
    """A remark about a Service."""

    code: NoteCode
    message: str


class FrontendExplanation(ReportPart, frozen=True, kw_only=True):
    """What happens to new connections to one frontend. `address` is `IP:port`, or `:port` for a NodePort.

    `endpoints` is the number of endpoints to which this node distributes the connections. `remark` says for whom or
    where this is so.
    """

    kind: FrontendKind
    address: str
    protocol: Protocol
    outcome: Outcome
    endpoints: int = 0
    remark: str = ""


class EndpointExplanation(ReportPart, frozen=True, kw_only=True):
    """An endpoint of a port in an EndpointSlice, and why this node sends connections to it or does not."""

    address: str
    node: str
    slice: str
    used: bool
    state: EndpointState
    message: str


class PortExplanation(ReportPart, frozen=True, kw_only=True):
    """One port of a Service. `reason` is None if the port works."""

    name: str
    port: int
    protocol: Protocol
    target_port: str
    verdict: Verdict
    reason: Reason | None
    frontends: tuple[FrontendExplanation, ...]
    endpoints: tuple[EndpointExplanation, ...]


class ChangedRule(ReportPart, frozen=True, kw_only=True):
    """An object of the rules in the kernel that is not as planned: a chain, set, map or element."""

    family: str
    object: str
    problem: str


class KernelExplanation(ReportPart, frozen=True, kw_only=True):
    """Whether the kernel has exactly the rules of the Service. `matches` is None if they were not compared."""

    matches: bool | None
    summary: str
    differences: tuple[ChangedRule, ...] = ()


class FlowExplanation(ReportPart, frozen=True, kw_only=True):
    """Tracked connections to one frontend that are answered by one address. `count` is their number."""

    frontend: str
    protocol: Protocol
    endpoint: str
    count: int
    stale: bool


class ClientExplanation(ReportPart, frozen=True, kw_only=True):
    """Where a client is, seen from this node. The outcomes of the frontends are those for this client.

    `inside` is None if it is unknown whether the client is inside the cluster. `source_allowed` is None if the Service
    has no `loadBalancerSourceRanges`.
    """

    address: str
    location: str
    inside: bool | None
    source_allowed: bool | None
    remark: str = ""


class ExplainSource(ReportPart, frozen=True, kw_only=True):
    """A source of facts. If it was not used, `detail` says why, and what is therefore unknown."""

    name: Literal["objects", "daemon", "API server", "kernel", "conntrack"]
    used: bool
    detail: str


class ServiceExplanation(Report, frozen=True, kw_only=True):
    """Whether a Service works on this node, and why not. `reason` is None if the verdict is WORKS.

    `symptom` is what clients see. `unseen` is what could not be seen, and could change the answer.
    """

    service: str
    node: str
    mode: str
    verdict: Verdict
    reason: Reason | None
    symptom: str
    type: str
    ports: tuple[PortExplanation, ...]
    policies: tuple[str, ...]
    notes: tuple[ExplainNote, ...]
    kernel: KernelExplanation
    flows: tuple[FlowExplanation, ...]
    client: ClientExplanation | None
    sources: tuple[ExplainSource, ...]
    unseen: tuple[str, ...]
