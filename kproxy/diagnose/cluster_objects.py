"""Services, Pods and NetworkPolicies with the fields that explain why a Service has no endpoints. Pure.

The types in `kproxy.kube.codec.schema` have only the fields that the rules depend on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from kproxy.kube.codec.conversion import HEADLESS_LABEL, PROXY_NAME_LABEL, SERVICE_NAME_LABEL, IgnoredField
from kproxy.kube.codec.json_codec import decode_object, decoder
from kproxy.kube.codec.object_error import ObjectError
from kproxy.kube.codec.schema import (
    ApiEndpoint,
    ApiEndpointSlice,
    ApiMetadata,
    ApiNode,
    ApiService,
    ApiServiceCIDR,
    ApiStruct,
)
from kproxy.model.addresses import canonical_address
from kproxy.model.types import EndpointSlice, Node, Service, ServiceKey

_LIST = "List"
_S = TypeVar("_S", bound=Struct)


class SeenServicePort(ApiStruct):
    """ServicePort (core/v1)."""

    port: int = 0
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None

    @property
    def target(self) -> int | str:
        """The target port, which is the port itself by default."""
        return self.port if self.target_port in {None, "", 0} else self.target_port or 0


class SeenServiceSpec(ApiStruct):
    """ServiceSpec (core/v1)."""

    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    external_name: str = ""
    selector: dict[str, str] | None = None
    ports: list[SeenServicePort] | None = None
    publish_not_ready_addresses: bool = False
    external_traffic_policy: str = ""
    load_balancer_source_ranges: list[str] | None = None


class SeenIngress(ApiStruct):
    """LoadBalancerIngress (core/v1)."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str | None = None


class SeenBalancer(ApiStruct):
    """LoadBalancerStatus (core/v1)."""

    ingress: list[SeenIngress] | None = None


class SeenServiceStatus(ApiStruct):
    """ServiceStatus (core/v1)."""

    load_balancer: SeenBalancer | None = None


class SeenService(ApiStruct):
    """Service (core/v1)."""

    metadata: ApiMetadata
    spec: SeenServiceSpec = msgspec.field(default_factory=SeenServiceSpec)
    status: SeenServiceStatus | None = None

    @property
    def ingress(self) -> list[SeenIngress]:
        """The addresses of its load balancer."""
        balancer = self.status.load_balancer if self.status else None
        return (balancer.ingress or []) if balancer else []


class PodPort(ApiStruct):
    """ContainerPort (core/v1)."""

    container_port: int = 0
    name: str = ""
    protocol: str = "TCP"


class PodContainer(ApiStruct):
    """Container (core/v1). A restart policy marks an init container that keeps running, a sidecar."""

    name: str = ""
    ports: list[PodPort] | None = None
    restart_policy: str = ""
    readiness_probe: dict[str, Any] | None = None
    startup_probe: dict[str, Any] | None = None


class PodSpec(ApiStruct):
    """PodSpec (core/v1)."""

    node_name: str = ""
    host_network: bool = False
    containers: list[PodContainer] | None = None
    init_containers: list[PodContainer] | None = None


class ContainerReason(ApiStruct):
    """ContainerStateWaiting or ContainerStateTerminated (core/v1)."""

    reason: str = ""
    message: str = ""
    exit_code: int | None = None


class ContainerState(ApiStruct):
    """ContainerState (core/v1)."""

    waiting: ContainerReason | None = None
    running: dict[str, Any] | None = None
    terminated: ContainerReason | None = None


class ContainerStatus(ApiStruct):
    """ContainerStatus (core/v1)."""

    name: str = ""
    ready: bool = False
    started: bool | None = None
    state: ContainerState | None = None


class PodCondition(ApiStruct):
    """PodCondition (core/v1)."""

    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class PodIP(ApiStruct):
    """PodIP (core/v1)."""

    ip: str = ""


class PodStatus(ApiStruct):
    """PodStatus (core/v1)."""

    phase: str = ""
    reason: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[PodIP] | None = msgspec.field(default=None, name="podIPs")
    conditions: list[PodCondition] | None = None
    container_statuses: list[ContainerStatus] | None = None
    init_container_statuses: list[ContainerStatus] | None = None


class Pod(ApiStruct):
    """Pod (core/v1)."""

    metadata: ApiMetadata
    spec: PodSpec = msgspec.field(default_factory=PodSpec)
    status: PodStatus = msgspec.field(default_factory=PodStatus)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its addresses in canonical form."""
        texts = [each.ip for each in self.status.pod_ips or ()] or [self.status.pod_ip]
        return tuple(address for text in texts if text and (address := canonical_address(text)))

    @property
    def ports(self) -> list[PodPort]:
        """The ports that its containers declare, including sidecars."""
        sidecars = [each for each in self.spec.init_containers or () if each.restart_policy == "Always"]
        return [port for each in (*(self.spec.containers or ()), *sidecars) for port in each.ports or ()]

    @property
    def finished(self) -> bool:
        """Whether all its containers have ended for good."""
        return self.status.phase in {"Succeeded", "Failed"}

    @property
    def ready(self) -> bool:
        """Whether its condition Ready is true."""
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions or ())

    @property
    def unready(self) -> bool:
        """Whether its status says that it is not ready. Without a status, this is unknown."""
        condition = next((each.status for each in self.status.conditions or () if each.type == "Ready"), "")
        if condition:
            return condition != "True"
        waiting = any(not each.ready for each in self.status.container_statuses or ())
        return waiting or self.finished or self.status.phase == "Pending"

    @property
    def terminating(self) -> bool:
        """Whether it is being deleted."""
        return self.metadata.deletion_timestamp is not None


class _SeenNodeStatus(ApiStruct):
    conditions: list[PodCondition] | None = None


class _SeenNode(ApiStruct):
    metadata: ApiMetadata
    status: _SeenNodeStatus | None = None

    @property
    def unready(self) -> bool:
        conditions = (self.status.conditions or ()) if self.status else ()
        return any(each.type == "Ready" and each.status != "True" for each in conditions)


class SelectorRequirement(ApiStruct):
    """LabelSelectorRequirement (meta/v1)."""

    key: str = ""
    operator: str = ""
    values: list[str] | None = None


class LabelSelector(ApiStruct):
    """LabelSelector (meta/v1). An empty selector matches everything."""

    match_labels: dict[str, str] | None = None
    match_expressions: list[SelectorRequirement] | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether an object with these labels is selected."""
        return is_subset(self.match_labels or {}, labels) and all(
            _meets(each, labels) for each in self.match_expressions or ()
        )


class NetworkPolicySpec(ApiStruct):
    """NetworkPolicySpec (networking.k8s.io/v1)."""

    pod_selector: LabelSelector = msgspec.field(default_factory=LabelSelector)
    policy_types: list[str] | None = None
    ingress: list[dict[str, Any]] | None = None


class NetworkPolicy(ApiStruct):
    """NetworkPolicy (networking.k8s.io/v1)."""

    metadata: ApiMetadata
    spec: NetworkPolicySpec = msgspec.field(default_factory=NetworkPolicySpec)

    @property
    def restricts_ingress(self) -> bool:
        """Whether it restricts connections to the Pods that it selects. An empty ingress rule allows everything."""
        if any(not (rule.get("from") or rule.get("ports")) for rule in self.spec.ingress or ()):
            return False
        return not self.spec.policy_types or "Ingress" in self.spec.policy_types


class _SeenSlice(ApiStruct):
    metadata: ApiMetadata
    address_type: str = ""
    endpoints: list[ApiEndpoint] | None = None


class SeenSlice(Struct, frozen=True):
    """An EndpointSlice. `decoded` is None if kproxy ignores it; `problem` is why, in a few words.

    `label` is the name of its Service, "" if it has none. `managed_by` is the name of the controller that writes it, ""
    if it was created by hand. `ignored` are its endpoints and ports that cannot be used, and `addresses` are the
    addresses of its endpoints as they are in the object. `invalid` is true if the object as a whole cannot be used.
    """

    namespace: str
    name: str
    label: str
    decoded: EndpointSlice | None
    problem: str = ""
    managed_by: str = ""
    ignored: tuple[IgnoredField, ...] = ()
    addresses: tuple[str, ...] = ()
    invalid: bool = False
    foreign_proxy: str = ""


class InvalidService(Struct, frozen=True):
    """A Service that cannot be used, and why."""

    namespace: str
    name: str
    problem: str


class ClusterObjects(Struct, frozen=True, dict=True):
    """Objects of a cluster. A kind is None if its objects could not be seen.

    `service_objects` are the Services as users write them, and `services` those of them that get rules.
    `unready_nodes` are the names of the Nodes whose condition Ready is not true.
    `sees_all_services` is false if there may be Services in other namespaces that could not be seen.
    """

    service_objects: tuple[SeenService, ...] = ()
    services: tuple[Service, ...] = ()
    invalid_services: tuple[InvalidService, ...] = ()
    slices: tuple[SeenSlice, ...] | None = None
    nodes: tuple[Node, ...] | None = None
    pods: tuple[Pod, ...] | None = None
    policies: tuple[NetworkPolicy, ...] | None = None
    service_cidrs: tuple[str, ...] = ()
    sees_all_services: bool = True
    unready_nodes: frozenset[str] = frozenset()

    def service_object(self, key: ServiceKey) -> SeenService | None:
        """Return the Service with this key as its user wrote it."""
        return next((each for each in self.service_objects if key_of(each.metadata) == key), None)

    def invalid_service(self, key: ServiceKey) -> InvalidService | None:
        """Return the Service with this key if it cannot be used."""
        return next((each for each in self.invalid_services if f"{each.namespace}/{each.name}" == key), None)

    def service(self, key: ServiceKey) -> Service | None:
        """Return the Service with this key, if it gets rules."""
        return next((each for each in self.services if each.key == key), None)

    def slices_of(self, key: ServiceKey) -> tuple[SeenSlice, ...]:
        """Return the slices that name the Service with this key."""
        return self._slices_by_service.get(key, ())

    @cached_property
    def _slices_by_service(self) -> dict[ServiceKey, tuple[SeenSlice, ...]]:
        found: dict[ServiceKey, list[SeenSlice]] = {}
        for each in self.slices or ():
            found.setdefault(f"{each.namespace}/{each.label}", []).append(each)
        return {key: tuple(slices) for key, slices in found.items()}


KIND_TYPES: dict[str, tuple[type[ApiStruct], ...]] = {
    "Service": (SeenService, ApiService),
    "EndpointSlice": (_SeenSlice, ApiEndpointSlice),
    "Node": (_SeenNode, ApiNode),
    "Pod": (Pod,),
    "NetworkPolicy": (NetworkPolicy,),
    "ServiceCIDR": (ApiServiceCIDR,),
}
"""The types in which objects of each kind are decoded. Together, they have all fields that matter."""
_decode_service = decoder(SeenService)
_decode_slice = decoder(_SeenSlice)
_decode_pod = decoder(Pod)
_decode_node = decoder(_SeenNode)
_decode_policy = decoder(NetworkPolicy)


def key_of(metadata: ApiMetadata) -> ServiceKey:
    """Return `namespace/name`. Objects in files may lack a namespace, which is then `default`."""
    return f"{metadata.namespace or 'default'}/{metadata.name}"


def is_subset(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return whether an object with these labels has all labels of a selector."""
    return all(labels.get(name) == value for name, value in selector.items())


def _meets(requirement: SelectorRequirement, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(requirement.key), requirement.values or []
    if requirement.operator == "In":
        return value in values
    if requirement.operator == "NotIn":
        return value not in values
    return (value is not None) is (requirement.operator == "Exists")


def items(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a document: the document itself, or the items of a list, with their kinds."""
    if not isinstance(content, dict):
        return
    kind = str(content.get("kind") or "")
    if not kind.endswith(_LIST):
        yield content
        return
    for item in content.get("items") or ():
        if isinstance(item, dict):
            yield {"kind": kind.removesuffix(_LIST), **item}


def cluster_objects(objects: Iterable[Mapping[str, Any]], seen: Sequence[str] | None = None) -> ClusterObjects:
    """Decode objects that were parsed from JSON or YAML.

    `seen` are the kinds that were read completely. By default these are Services, and the kinds of which there is at
    least one object. Objects of other kinds are ignored.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KIND_TYPES}
    for each in objects:
        if (kind := str(each.get("kind") or "")) in by_kind:
            by_kind[kind].append(_with_namespace(each))
    known = {kind for kind in KIND_TYPES if by_kind[kind]} | {"Service"} if seen is None else set(seen)
    services, invalid = _services(by_kind["Service"])
    return ClusterObjects(
        service_objects=tuple(_all(_decode_service, by_kind["Service"])),
        services=services,
        invalid_services=invalid,
        slices=tuple(_slice(each) for each in by_kind["EndpointSlice"]) if "EndpointSlice" in known else None,
        nodes=tuple(_nodes(by_kind["Node"])) if "Node" in known else None,
        pods=tuple(_all(_decode_pod, by_kind["Pod"])) if "Pod" in known else None,
        policies=tuple(_all(_decode_policy, by_kind["NetworkPolicy"])) if "NetworkPolicy" in known else None,
        sees_all_services="Service" in known,
        unready_nodes=frozenset(each.metadata.name for each in _all(_decode_node, by_kind["Node"]) if each.unready),
        service_cidrs=tuple(cidr for each in by_kind["ServiceCIDR"] for cidr in _cidrs(each)),
    )


def _with_namespace(each: Mapping[str, Any]) -> dict[str, Any]:
    metadata = each.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("namespace") or each.get("kind") in {"Node", "ServiceCIDR"}:
        return dict(each)
    return {**each, "metadata": {**metadata, "namespace": "default"}}


def _all(decode: Any, objects: Iterable[dict[str, Any]]) -> Iterator[Any]:
    for each in objects:
        try:
            yield decode(each)
        except ObjectError:  # a Service is reported as invalid; other objects only help to explain
            continue


def _services(objects: Iterable[dict[str, Any]]) -> tuple[tuple[Service, ...], tuple[InvalidService, ...]]:
    services: list[Service] = []
    invalid: list[InvalidService] = []
    for each in objects:
        metadata = each.get("metadata")
        names = metadata if isinstance(metadata, dict) else {}
        try:
            decoded = decode_object(Service, each).object
            _decode_service(each)
        except ObjectError as error:
            invalid.append(InvalidService(str(names.get("namespace")), str(names.get("name")), str(error)))
        else:
            if isinstance(decoded, Service):
                services.append(decoded)
    return tuple(services), tuple(invalid)


def _nodes(objects: Iterable[dict[str, Any]]) -> Iterator[Node]:
    for each in objects:
        try:
            decoded = decode_object(Node, each).object
        except ObjectError:
            continue
        if isinstance(decoded, Node):
            yield decoded


def _cidrs(each: Mapping[str, Any]) -> Iterator[str]:
    spec = each.get("spec")
    found = spec.get("cidrs") if isinstance(spec, dict) else None
    yield from (str(cidr) for cidr in found or ())


def _slice(each: dict[str, Any]) -> SeenSlice:
    try:
        raw = _decode_slice(each)
    except ObjectError as error:
        metadata = each.get("metadata")
        names = metadata if isinstance(metadata, dict) else {}
        labels = names.get("labels") if isinstance(names.get("labels"), dict) else {}
        label = str((labels or {}).get(SERVICE_NAME_LABEL, ""))
        name, namespace = str(names.get("name")), str(names.get("namespace"))
        return SeenSlice(namespace, name, label, None, str(error), invalid=True)
    labels = raw.metadata.labels or {}
    seen = SeenSlice(
        raw.metadata.namespace,
        raw.metadata.name,
        labels.get(SERVICE_NAME_LABEL, ""),
        None,
        managed_by=labels.get("endpointslice.kubernetes.io/managed-by", ""),
        addresses=tuple((endpoint.addresses or [""])[0] for endpoint in raw.endpoints or ()),
        foreign_proxy=labels.get(PROXY_NAME_LABEL, ""),
    )
    try:
        decoded = decode_object(EndpointSlice, each)
    except ObjectError as error:
        return replace(seen, problem=str(error), invalid=True)
    if isinstance(decoded.object, EndpointSlice):
        return replace(seen, decoded=decoded.object, ignored=decoded.ignored_fields)
    if PROXY_NAME_LABEL in labels:
        problem = f"it has the label {PROXY_NAME_LABEL}"
    elif HEADLESS_LABEL in labels:
        problem = f"it has the label {HEADLESS_LABEL}"
    elif not labels.get(SERVICE_NAME_LABEL):
        problem = f"it has no label {SERVICE_NAME_LABEL}"
    else:
        problem = f"its addressType is {raw.address_type or 'missing'}"
    return replace(seen, problem=problem)
