"""What the Pods behind a Service have to do with its endpoints: selectors, named ports, readiness. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from kproxy.diagnose.cluster_objects import (
    ContainerStatus,
    NetworkPolicy,
    Pod,
    PodCondition,
    PodPort,
    SeenServicePort,
    is_subset,
)
from kproxy.diagnose.explain_report import Reason

MAX_NAMED = 3
"""Maximum number of Pods that one sentence names."""
_TYPO = 0.8
"""Minimum similarity of two label values, from 0 to 1, of which one is probably a misspelling of the other."""


def plural(count: int, word: str) -> str:
    """Return a number with a noun, such as `1 pod` or `2 pods`."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def names_of(pods: Sequence[Pod]) -> str:
    """Return the names of some Pods."""
    shown = ", ".join(pod.metadata.name for pod in pods[:MAX_NAMED])
    return shown + (f" and {len(pods) - MAX_NAMED} more" if len(pods) > MAX_NAMED else "")


def selector_text(selector: Mapping[str, str]) -> str:
    """Return a selector as kubectl accepts it after -l."""
    return ",".join(f"{name}={value}" for name, value in selector.items())


def resolves(pod: Pod, port: SeenServicePort) -> bool:
    """Return whether a Pod has the target port of a service port: a name must be declared for the same protocol."""
    if isinstance(port.target, int):
        return True
    return any(each.name == port.target and each.protocol == port.protocol for each in pod.ports)


def declared_text(pods: Iterable[Pod]) -> str:
    """Return the ports that the containers of Pods declare, such as `http=8080, metrics=9090/UDP`."""
    ports = dict.fromkeys(_declared(port) for pod in pods for port in pod.ports)
    return ", ".join(ports)


def _declared(port: PodPort) -> str:
    suffix = "" if port.protocol == "TCP" else f"/{port.protocol}"
    return f"{port.name}={port.container_port}{suffix}" if port.name else f"{port.container_port}{suffix}"


def unmatched_selector(namespace: str, selector: Mapping[str, str], every: Sequence[Pod]) -> Reason:
    """Return the reason of a Service whose selector matches no Pod. `every` are all Pods that were seen."""
    text = selector_text(selector)
    own = [pod for pod in every if pod.metadata.namespace == namespace]
    elsewhere = [pod for pod in every if pod.metadata.namespace != namespace and _has_labels(selector, pod)]
    details: list[str] = []
    compare = f"compare the selector with the labels of the pods: kubectl get pods -n {namespace} --show-labels"
    fix = f"start the pods (does their Deployment have 0 replicas?), or {compare}"
    if (best := _closest(selector, own)) is not None:
        pod, wrong = best
        labels = pod.metadata.labels or {}
        found = ", ".join(f"{name}={labels[name]}" if name in labels else f"no label {name}" for name in wrong)
        details.append(f"pod {pod.metadata.name} comes closest: it has {found}")
        name = wrong[0]
        is_typo = get_close_matches(labels.get(name, ""), [selector[name]], 1, _TYPO)
        if len(wrong) == 1 and is_typo:
            fix = f'set spec.selector.{name} to "{labels[name]}", or the label {name} of the pods to "{selector[name]}"'
        elif len(wrong) == 1 and name not in labels:
            fix = f"add the label {name}={selector[name]} to the pods, or remove it from spec.selector"
    elif elsewhere:
        other = elsewhere[0].metadata.namespace
        details.append(
            f"namespace {other} has {plural(len(elsewhere), 'pod')} with these labels: {names_of(elsewhere)}"
        )
        fix = f"create the Service in namespace {other}: a selector matches only pods of the Service's own namespace"
    elif not own:
        details.append(f"namespace {namespace} has no pods")
        fix = "start the pods, for example scale their Deployment to 1 or more replicas"
    else:
        details.append(f"namespace {namespace} has {plural(len(own), 'pod')} with other labels: {names_of(own)}")
    message = f"no pod in namespace {namespace} has the labels of spec.selector: {text}"
    return Reason(code="SelectorMatchesNothing", message=message, details=tuple(details), fix=fix)


def _has_labels(selector: Mapping[str, str], pod: Pod) -> bool:
    return is_subset(selector, pod.metadata.labels or {})


def _closest(selector: Mapping[str, str], pods: Iterable[Pod]) -> tuple[Pod, list[str]] | None:
    """Return the Pod that has most labels of a selector, or similar values, and the names of the labels that differ."""
    best: tuple[Pod, list[str]] | None = None
    best_score = 0.0
    for pod in pods:
        labels = pod.metadata.labels or {}
        wrong = [name for name, value in selector.items() if labels.get(name) != value]
        similar = sum(bool(get_close_matches(labels.get(name, ""), [selector[name]], 1)) for name in wrong)
        score = len(selector) - len(wrong) + 0.5 * similar
        if score > best_score:
            best, best_score = (pod, wrong), score
    return best


def unresolved_target_port(port: SeenServicePort, index: int, pods: Sequence[Pod]) -> Reason:
    """Return the reason of a port whose targetPort is a name that none of its Pods declares."""
    same_name = [each for pod in pods for each in pod.ports if each.name == port.target]
    declared = [each for pod in pods for each in pod.ports if each.name and each.protocol == port.protocol]
    names = list(dict.fromkeys(each.name for each in declared))
    field = f"spec.ports[{index}].targetPort"
    if same_name:
        protocol = same_name[0].protocol
        message = (
            f'targetPort "{port.target}" is declared for {protocol}, but the port of the Service is {port.protocol}'
        )
        fix = f"set spec.ports[{index}].protocol to {protocol}, or declare the port of the container as {port.protocol}"
        return Reason(code="TargetPortUnresolved", message=message, details=(_they_declare(pods),), fix=fix)
    close = get_close_matches(str(port.target), names, 1) or [name for name in names if name == port.name]
    numbers = {each.container_port for pod in pods for each in pod.ports}
    guess = close[0] if close else names[0] if len(names) == len(numbers) == 1 else ""
    unnamed = [each for pod in pods for each in pod.ports if not each.name and each.protocol == port.protocol]
    if str(port.target).isdigit():
        fix = f"remove the quotes: {field}: {port.target} is a number, with quotes it is a name"
    elif guess:
        fix = f'set {field} to "{guess}"'
    elif unnamed:
        fix = f'name containerPort {unnamed[0].container_port} "{port.target}", or set {field} to the number'
    else:
        fix = f'set {field} to one of these, or name the port of a container "{port.target}"'
    if not numbers and not str(port.target).isdigit():
        fix = f'add a containerPort with "name: {port.target}" to the container, or set {field} to a number'
    of = "its pod" if len(pods) == 1 else f"any of its {len(pods)} pods"
    message = f'targetPort "{port.target}" is not a port name of {of}'
    return Reason(code="TargetPortUnresolved", message=message, details=(_they_declare(pods),), fix=fix)


def _they_declare(pods: Sequence[Pod]) -> str:
    subject = "it declares" if len(pods) == 1 else "they declare"
    return f"{subject}: {declared_text(pods)}" if declared_text(pods) else f"{subject} no ports"


def pods_not_ready(pods: Sequence[Pod], unready_nodes: Collection[str] = ()) -> Reason:
    """Return the reason of a Service none of whose Pods is ready. `pods` are those that its selector matches."""
    waiting = [pod for pod in pods if not pod.finished] or list(pods)
    causes: dict[str, list[Pod]] = {}
    for pod in waiting:
        causes.setdefault(why_not_ready(pod, unready_nodes), []).append(pod)
    details = [f"{names_of(group)}: {cause}" for cause, group in causes.items()]
    first = waiting[0]
    namespace, name = first.metadata.namespace, first.metadata.name
    fix = next(
        (fix for pod in waiting if (fix := _fix(pod, unready_nodes))),
        f"see the reason: kubectl describe pod -n {namespace} {name}",
    )
    if all(pod.finished for pod in pods):
        message = f"its {plural(len(pods), 'pod')} ended and will not serve again" if len(pods) > 1 else "its pod ended"
    else:
        message = f"none of its {len(waiting)} pods is ready" if len(waiting) > 1 else "its only pod is not ready"
    return Reason(code="PodsNotReady", message=message, details=tuple(details[:5]), fix=fix)


def why_not_ready(pod: Pod, unready_nodes: Collection[str] = ()) -> str:
    """Return why a Pod is not ready, in one line."""
    status = pod.status
    if pod.finished or pod.terminating:
        ended = f"phase {status.phase}" + (f" ({status.reason})" if status.reason else "")
        return ended if pod.finished else "being deleted"
    conditions = {each.type: each for each in status.conditions or ()}
    scheduled = conditions.get("PodScheduled")
    if scheduled is not None and scheduled.status == "False":
        return "not scheduled to a node" + (f": {scheduled.message}" if scheduled.message else "")
    if pod.spec.node_name in unready_nodes:
        return f"its node {pod.spec.node_name} is not ready"
    if problem := _container_problems(pod):
        return problem
    return _ready_problem(conditions.get("Ready")) or f"phase {status.phase or 'unknown'}"


def _ready_problem(ready: PodCondition | None) -> str:
    if ready is not None and ready.status == "Unknown":
        return "its node does not report its state: " + (ready.reason or "NodeStatusUnknown")
    return ready.message if ready is not None else ""


def _container_problems(pod: Pod) -> str:
    status = pod.status
    if (problem := _container_problem(status.init_container_statuses or ())) is not None:
        return f"init container {problem}"
    if (problem := _container_problem(status.container_statuses or ())) is not None:
        return f"container {problem}"
    for each in status.container_statuses or ():
        if not each.ready and each.state is not None and each.state.running is not None:
            spec = next((one for one in pod.spec.containers or () if one.name == each.name), None)
            is_starting = each.started is False and spec is not None and spec.startup_probe is not None
            problem = "startup probe has not succeeded yet" if is_starting else "readiness probe fails"
            return f"container {each.name} runs, but its {problem}"
    return ""


def _container_problem(statuses: Iterable[ContainerStatus]) -> str | None:
    for each in statuses:
        state = each.state
        if state is None:
            continue
        if state.waiting is not None and state.waiting.reason not in {"", "PodInitializing", "ContainerCreating"}:
            detail = f": {state.waiting.message}" if state.waiting.message else ""
            return f"{each.name} is waiting: {state.waiting.reason}{detail}"
        if state.terminated is not None and state.terminated.exit_code:
            return f"{each.name} ended with exit code {state.terminated.exit_code}"
    return None


def _fix(pod: Pod, unready_nodes: Collection[str]) -> str:
    namespace, name = pod.metadata.namespace, pod.metadata.name
    problem = why_not_ready(pod, unready_nodes)
    if pod.spec.node_name in unready_nodes and pod.spec.node_name in problem:
        return f"repair the node, or remove it: kubectl describe node {pod.spec.node_name}"
    if "CrashLoopBackOff" in problem or "exit code" in problem:
        return f"read why it ends: kubectl logs -n {namespace} {name} --previous"
    if "Image" in problem:
        return "correct the name of the image or the credentials of its registry"
    if "startup probe" in problem:
        return f"make the startup probe succeed; its last failures: kubectl describe pod -n {namespace} {name}"
    if "readiness probe" in problem:
        return f"make the readiness probe succeed; its last failures: kubectl describe pod -n {namespace} {name}"
    return ""


def policies_for(policies: Iterable[NetworkPolicy], namespace: str, pods: Sequence[Pod]) -> Iterator[NetworkPolicy]:
    """Yield the NetworkPolicies that restrict connections to some of the Pods."""
    for policy in policies:
        if policy.metadata.namespace == namespace and policy.restricts_ingress:
            selector = policy.spec.pod_selector
            if any(selector.matches(pod.metadata.labels or {}) for pod in pods):
                yield policy
