"""Why a service port has no usable endpoints, in the order in which endpoints come into being. Pure.

A Service selects Pods, the Pods declare the port, they become ready, a controller lists them in EndpointSlices, and
kproxy uses those that it can. The first step that fails is the reason; everything after it is a consequence.
"""

from __future__ import annotations

from collections.abc import Sequence

from kproxy.diagnose.cluster_objects import Pod, SeenService, SeenServicePort, SeenSlice, is_subset
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import Reason
from kproxy.diagnose.pods import (
    declared_text,
    names_of,
    plural,
    pods_not_ready,
    resolves,
    selector_text,
    unmatched_selector,
    unresolved_target_port,
)
from kproxy.documents.document import field_path_text
from kproxy.kube.codec.conversion import PROXY_NAME_LABEL, SERVICE_NAME_LABEL
from kproxy.model.addresses import family_of
from kproxy.model.endpoints import endpoints_by_socket
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, ServicePort

PODS_CONTROLLER = "endpointslice-controller.k8s.io"
"""The value of the label `endpointslice.kubernetes.io/managed-by` of slices that list the Pods of a selector."""


def matching_pods(facts: Facts) -> tuple[Pod, ...] | None:
    """Return the Pods that the Service selects, or None if Pods could not be seen or it has no selector."""
    objects = facts.objects
    raw = objects.service_object(facts.key) if objects else None
    if objects is None or objects.pods is None or raw is None or not raw.spec.selector:
        return None
    namespace, selector = facts.key.partition("/")[0], raw.spec.selector
    own = [pod for pod in objects.pods if pod.metadata.namespace == namespace]
    if not own and not facts.live and any(each.endpoints for each in facts.slices):
        return None  # the files lack the Pods of this namespace
    return tuple(pod for pod in own if is_subset(selector, pod.metadata.labels or {}))


def managed_endpoints(facts: Facts) -> list[Endpoint]:
    """Return the endpoints of the slices that a controller writes for the Pods of the Service."""
    seen = facts.objects.slices_of(facts.key) if facts.objects else ()
    managed = [each.decoded for each in seen if each.decoded is not None and each.managed_by == PODS_CONTROLLER]
    return [endpoint for each in managed for endpoint in each.endpoints]


def endpoints_without_pods(facts: Facts, port: ServicePort, families: Sequence[Family]) -> Reason | None:
    """Return the reason if ready endpoints have addresses of none of the Pods that the Service selects.

    Families in which the status of no Pod has an address are omitted.
    """
    taken = {address for pod in matching_pods(facts) or () if not pod.finished for address in pod.addresses}
    families = [family for family in families if any(family_of(address) is family for address in taken)]
    managed = {each.address for each in managed_endpoints(facts)} - taken
    known = [
        endpoint
        for family in families
        for endpoint in endpoints_by_socket(facts.slices, family, port.name, port.protocol).values()
    ]
    gone = sorted({each.address for each in known if each.ready and each.address in managed})
    if not gone:
        return None
    address = "this address" if len(gone) == 1 else "these addresses"
    shown = ", ".join(gone[:3]) + (" and others" if len(gone) > 3 else "")
    return Reason(
        code="EndpointSlicesOutOfDate",
        message=f"the EndpointSlices list {shown}, but no pod of the Service has {address}",
        details=("connections to an address without a pod fail",),
        fix="check that kube-controller-manager runs: it writes the EndpointSlices",
    )


def rejection_cause(facts: Facts, port: ServicePort, index: int, families: Sequence[Family]) -> Reason:
    """Return why a port has no usable endpoint in `families`. `index` is that of the port in `spec.ports`."""
    raw = facts.objects.service_object(facts.key) if facts.objects else None
    pods = matching_pods(facts)
    live = [pod for pod in pods or () if not pod.finished]
    in_pods = _cause_in_pods(facts, raw, index, pods, families) if raw is not None and pods is not None else None
    if in_pods is not None:
        return in_pods
    raw_port = _raw_port(raw, index)
    if raw_port is not None:
        live = [pod for pod in live if resolves(pod, raw_port)]
    known: dict[str, Endpoint] = {}
    ordered = sorted(facts.slices, key=lambda each: each.name)
    for family in families:
        known |= endpoints_by_socket(ordered, family, port.name, port.protocol)
    if known:
        return _unusable_endpoints(facts, known, pods, live)
    seen = facts.objects.slices_of(facts.key) if facts.objects else ()
    in_families = [each for each in facts.slices if each.family in families]
    if (reason := _unusable_slices(seen)) is not None:
        return reason
    if any(each.endpoints for each in in_families):
        return _port_in_no_slice(raw, port, index, in_families, live)
    if any(each.endpoints for each in facts.slices):
        has_addresses = any(family_of(address) in families for pod in live for address in pod.addresses)
        return _slice_missing(families) if has_addresses else family_missing(facts, families, pods)
    return _nothing_listed(facts, raw, pods, live)


def _unready_nodes(facts: Facts) -> frozenset[str]:
    return facts.objects.unready_nodes if facts.objects else frozenset()


def _cause_in_pods(
    facts: Facts, raw: SeenService, index: int, pods: Sequence[Pod], families: Sequence[Family]
) -> Reason | None:
    live = [pod for pod in pods if not pod.finished]
    namespace, selector = facts.key.partition("/")[0], raw.spec.selector or {}
    every = (facts.objects.pods if facts.objects else None) or ()
    if not pods:
        return unmatched_selector(namespace, selector, every)
    if not live:
        return pods_not_ready(pods, _unready_nodes(facts))
    port = _raw_port(raw, index)
    if port is not None and not any(resolves(pod, port) for pod in live):
        return unresolved_target_port(port, index, live)
    return family_missing(facts, families, pods) if lacks_addresses(live, families) else None


def lacks_addresses(pods: Sequence[Pod], families: Sequence[Family]) -> bool:
    """Return whether Pods have addresses, but none of these families."""
    addresses = [address for pod in pods for address in pod.addresses]
    return bool(addresses) and not any(family_of(address) in families for address in addresses)


def _raw_port(raw: SeenService | None, index: int) -> SeenServicePort | None:
    ports = (raw.spec.ports or []) if raw is not None else []
    return ports[index] if index < len(ports) else None


def _unusable_endpoints(
    facts: Facts, known: dict[str, Endpoint], pods: Sequence[Pod] | None, live: Sequence[Pod]
) -> Reason:
    """Return the reason if slices list endpoints of the port, but none is usable."""
    count = len(known)
    if all(endpoint.terminating for endpoint in known.values()):
        staying = [pod for pod in live if not pod.terminating]
        if staying and all(pod.unready for pod in staying):
            return pods_not_ready(staying, _unready_nodes(facts))
        subject = "its only endpoint is" if count == 1 else f"all {count} endpoints are"
        return Reason(
            code="OnlyTerminating",
            message=f"{subject} terminating and no longer serving",
            fix="start pods that stay: check the replicas of the Deployment and whether new pods can be scheduled",
        )
    if pods is not None and live and all(pod.unready for pod in live):
        return pods_not_ready(live, _unready_nodes(facts))
    subject = "its only endpoint is" if count == 1 else f"none of its {count} endpoints is"
    message = f"{subject} {'not ' if count == 1 else ''}ready"
    details: tuple[str, ...] = ()
    if ready := [pod.metadata.name for pod in live if pod.ready]:
        verb = "is" if len(ready) == 1 else "are"
        details = (f"{plural(len(ready), 'pod')} {verb} ready, so the EndpointSlices are out of date",)
        fix = "check that kube-controller-manager runs: it writes the EndpointSlices"
    else:
        namespace = facts.key.partition("/")[0]
        fix = f"find out why the pods are not ready: kubectl get pods -n {namespace}, then kubectl describe pod"
    return Reason(code="NoReadyEndpoints", message=message, details=details, fix=fix)


def _nothing_listed(facts: Facts, raw: SeenService | None, pods: Sequence[Pod] | None, live: Sequence[Pod]) -> Reason:
    """Return the reason if no slice lists any endpoint."""
    unready = pods is not None and live and all(pod.unready for pod in live)
    published = raw is not None and raw.spec.publish_not_ready_addresses and any(pod.addresses for pod in live)
    if not unready or published:
        return _no_slices(facts, raw, pods, live)
    if not all(pod.terminating for pod in live):
        return pods_not_ready(live, _unready_nodes(facts))
    return Reason(
        code="OnlyTerminating",
        message=f"all of its pods are being deleted: {names_of(live)}",
        fix="start pods that stay: check the replicas of the Deployment",
    )


def _unusable_slices(seen: Sequence[SeenSlice]) -> Reason | None:
    """Return the reason if slices list endpoints, but kproxy cannot or must not use any of them."""
    foreign = [each for each in seen if each.foreign_proxy]
    if foreign and len(foreign) == len(seen):
        return Reason(
            code="ManagedElsewhere",
            message=f"its EndpointSlices have the label {PROXY_NAME_LABEL}: {foreign[0].foreign_proxy}",
            details=("kproxy leaves such slices to the service proxy that the label names",),
            fix="remove the label from the EndpointSlices, or ask the proxy that it names",
        )
    for each in seen:
        if each.invalid:
            return Reason(
                code="InvalidObject",
                message=f"EndpointSlice {each.name} cannot be used: {each.problem}",
                fix="correct the EndpointSlice, or the controller that writes it",
            )
    usable = [each for each in seen if each.decoded is not None and each.decoded.endpoints]
    broken = [each for each in seen if any(field.field[0] == "endpoints" for field in each.ignored)]
    if broken and not usable:
        return _ignored_fields(broken[0], "endpoint")
    unported = [each for each in seen if each.decoded is not None and each.ignored and not each.decoded.ports]
    return _ignored_fields(unported[0], "port") if unported else None


def _ignored_fields(each: SeenSlice, what: str) -> Reason:
    field = each.ignored[0]
    return Reason(
        code="InvalidObject",
        message=f"no {what} in EndpointSlice {each.name} can be used",
        details=(f"{field_path_text(field.field)} {field.problem}",),
        fix=f"correct the {what}s in the EndpointSlice",
    )


def _port_in_no_slice(
    raw: SeenService | None, port: ServicePort, index: int, slices: Sequence[EndpointSlice], pods: Sequence[Pod]
) -> Reason:
    """Return the reason if no slice has the port. `pods` are the Pods that have the target port."""
    found = {_port_text(target) for each in slices for target in each.ports}
    wanted = _port_text(port)
    raw_port = _raw_port(raw, index)
    details: tuple[str, ...] = (f"they have: {', '.join(sorted(found))}" if found else "they have no ports",)
    if pods and raw is not None and raw.spec.selector:
        has = "has" if len(pods) == 1 else "have"
        message = f"no EndpointSlice has the port {wanted}, although {plural(len(pods), 'pod')} {has} its target port"
        details += ("the EndpointSlices are out of date",)
        fix = "check that kube-controller-manager runs: it writes the EndpointSlices"
    elif raw is not None and raw.spec.selector and raw_port is not None and isinstance(raw_port.target, str):
        message = f'no pod resolves targetPort "{raw_port.target}": no EndpointSlice has the port {wanted}'
        fix = f"set spec.ports[{index}].targetPort to a port name that the pods declare, or to a number"
    else:
        message = f"no EndpointSlice of the Service has a port {wanted}"
        fix = f"give the port in the EndpointSlice the name and protocol of spec.ports[{index}], or the other way round"
    return Reason(code="TargetPortUnresolved", message=message, details=details, fix=fix)


def _slice_missing(families: Sequence[Family]) -> Reason:
    missing = " or ".join(family.value for family in families)
    return Reason(
        code="NoEndpoints",
        message=f"no EndpointSlice lists {missing} endpoints",
        details=(f"its pods have {missing} addresses, so an EndpointSlice is missing",),
        fix="check that kube-controller-manager runs: it writes the EndpointSlices",
    )


def _port_text(port: ServicePort | EndpointPort) -> str:
    return f'"{port.name}"/{port.protocol}' if port.name else f"unnamed/{port.protocol}"


def family_missing(facts: Facts, families: Sequence[Family], pods: Sequence[Pod] | None) -> Reason:
    """Return the reason of a Service that has a ClusterIP of `families`, but endpoints only of the other family."""
    missing = " and ".join(family.value for family in families)
    other = next(family for family in Family if family not in families) if len(families) == 1 else families[0]
    details = []
    if lacks_addresses(pods or (), families):
        details.append(f"its pods have only {other.value} addresses")
    both = len(facts.service.cluster_ips) > 1 if facts.service else False
    fix = (
        f"give the pods {missing} addresses (dual-stack pod network), or set spec.ipFamilyPolicy to SingleStack"
        if both
        else f"recreate the Service with spec.ipFamilies: [{other.value}]"
    )
    message = f"the Service has an {missing} ClusterIP, but only {other.value} endpoints"
    return Reason(code="FamilyMissing", message=message, details=tuple(details), fix=fix)


def _no_slices(
    facts: Facts,
    raw: SeenService | None,
    pods: Sequence[Pod] | None,
    live: Sequence[Pod],
) -> Reason:
    namespace, name = facts.key.split("/", 1)
    objects = facts.objects
    every = objects.slices if objects and objects.slices is not None else ()
    strays = [
        each for each in every if each.namespace == namespace and not each.label and each.name.startswith(f"{name}-")
    ]
    elsewhere = [each for each in every if each.label == name and each.namespace != namespace]
    details: list[str] = []
    if strays:
        details.append(f"EndpointSlice {strays[0].name} has no label {SERVICE_NAME_LABEL}")
        fix = f"label it: kubectl label endpointslice -n {namespace} {strays[0].name} {SERVICE_NAME_LABEL}={name}"
    elif raw is not None and not raw.spec.selector:
        details.append("it has no selector, so nothing creates EndpointSlices for it")
        if elsewhere:
            details.append(f"EndpointSlice {elsewhere[0].name} names it, but is in namespace {elsewhere[0].namespace}")
        fix = f"set spec.selector, or create an EndpointSlice with the label {SERVICE_NAME_LABEL}: {name}"
    elif pods is not None:
        verb = "matches" if len(live) == 1 else "match"
        details.append(f"{plural(len(live), 'pod')} {verb} the selector, but no EndpointSlice lists them")
        if facts.live:
            fix = "check that kube-controller-manager runs: it writes the EndpointSlices"
        else:
            fix = "check that kube-controller-manager runs, and that the files contain the EndpointSlices"
    else:
        selector = raw.spec.selector if raw else None
        shown = f" -l {selector_text(selector)}" if selector else ""
        details.append("pods could not be seen")
        fix = f"check that pods match the selector: kubectl get pods -n {namespace}{shown}"
    seen = objects.slices_of(facts.key) if objects else ()
    details += [f"kproxy ignores EndpointSlice {each.name}: {each.problem}" for each in seen if each.decoded is None]
    message = (
        "its EndpointSlices list no endpoints"
        if seen or facts.slices
        else "it has no EndpointSlices, so it has no endpoints"
    )
    return Reason(code="NoEndpoints", message=message, details=tuple(details), fix=fix)


def pods_without_port(pods: Sequence[Pod], port: SeenServicePort) -> str:
    """Return a remark about the Pods that lack the named target port, or about a number that no Pod declares; or ""."""
    if isinstance(port.target, str):
        lacking = [pod for pod in pods if not pod.finished and not resolves(pod, port)]
        if lacking:
            return f'{plural(len(lacking), "pod")} do not declare the port name "{port.target}": {names_of(lacking)}'
        return ""
    declared = [each for pod in pods for each in pod.ports]
    if declared and not any(each.container_port == port.target for each in declared):
        text = declared_text(pods)
        return (
            f"no pod declares targetPort {port.target}; they declare {text}: is a program listening on {port.target}?"
        )
    return ""
