"""Why a Service gets no rules on any node: it does not exist, is invalid, or belongs to something else. Pure."""

from __future__ import annotations

from difflib import get_close_matches

from kproxy.diagnose.cluster_objects import SeenService, key_of
from kproxy.diagnose.explain_facts import Facts
from kproxy.diagnose.explain_report import Reason
from kproxy.kube.codec.conversion import PROXY_NAME_LABEL
from kproxy.model.types import ServiceKey


def object_problem(facts: Facts, raw: SeenService | None) -> Reason | None:
    """Return why a Service gets no rules on any node, or None if it gets rules. `raw` is the Service as it was seen."""
    if facts.objects is None:
        return _unknown_to_daemon(facts)
    if raw is not None and PROXY_NAME_LABEL in (raw.metadata.labels or {}):
        return _managed_elsewhere((raw.metadata.labels or {})[PROXY_NAME_LABEL])
    namespace, name = facts.key.split("/", 1)
    invalid = facts.objects.invalid_service(facts.key)
    if invalid is not None:
        return Reason(
            code="InvalidObject",
            message=f"the Service cannot be used: {invalid.problem}",
            details=("kproxy keeps its last valid version",) if keeps_last_version(facts) else (),
            fix=f"correct the field: kubectl edit service -n {namespace} {name}",
        )
    return _no_such_service(facts, namespace, name) if raw is None else _without_address(facts.key, raw)


def keeps_last_version(facts: Facts) -> bool:
    """Return whether the daemon serves the last valid version of an invalid Service."""
    return facts.daemon is not None and facts.daemon.service is not None


def _managed_elsewhere(proxy: str) -> Reason:
    return Reason(
        code="ManagedElsewhere",
        message=f"the Service has the label {PROXY_NAME_LABEL}: {proxy}",
        details=("kproxy leaves it to the service proxy that the label names",),
        fix=f"remove the label, or make sure that {proxy or 'that proxy'} runs on this node",
    )


def _without_address(key: ServiceKey, raw: SeenService) -> Reason | None:
    """Return why a valid Service has no ClusterIP or no ports, or None if it has both."""
    namespace, name = key.split("/", 1)
    spec = raw.spec
    if spec.type == "ExternalName":
        target = spec.external_name
        return Reason(
            code="ExternalName",
            message=f"the Service is only a DNS alias for {target}: clients connect to that name, without rules",
            details=("TLS and HTTP clients send the name of the Service, which the target may not know",),
            fix=f"check that pods can resolve {target} and connect to it",
        )
    if spec.cluster_ip == "None":
        return Reason(
            code="Headless",
            message="the Service is headless (clusterIP: None): DNS returns the addresses of its pods, without rules",
            details=("clients connect to the pods directly, so they must use the port of the pods",),
            fix="remove clusterIP: None and recreate the Service if it needs an address of its own",
        )
    if not spec.cluster_ip:
        return Reason(
            code="ClusterIPPending",
            message="the Service has no ClusterIP yet",
            fix=f"see why none was allocated: kubectl describe service -n {namespace} {name}",
        )
    if not spec.ports:
        return Reason(
            code="InvalidObject",
            message="the Service has no ports (spec.ports is empty)",
            fix="add the port that clients use to spec.ports",
        )
    return None


def _unknown_to_daemon(facts: Facts) -> Reason | None:
    daemon = facts.daemon
    if daemon is None:
        return None
    if daemon.invalid:
        return Reason(
            code="InvalidObject",
            message="the Service cannot be used; the log of kproxy names the field",
            details=("kproxy keeps its last valid version",) if keeps_last_version(facts) else (),
            fix="search the log of kproxy for the name of the Service",
        )
    if daemon.service is not None:
        return None
    if not daemon.complete:
        return never_synced(facts)
    return Reason(
        code="NoSuchService",
        message="kproxy has no such Service, or serves it without rules: headless, ExternalName or another proxy's",
        fix=f"compare: kubectl get service -n {facts.key.partition('/')[0]}",
    )


def never_synced(facts: Facts) -> Reason:
    """Return the reason of a daemon that has not programmed anything yet."""
    return Reason(
        code="NotSyncedYet",
        message=f"kproxy on {facts.node_name} has not received all objects of the cluster yet",
        fix="see its log: it names what it waits for, such as the API server",
    )


def _no_such_service(facts: Facts, namespace: str, name: str) -> Reason:
    keys = [key_of(each.metadata) for each in facts.objects.service_objects] if facts.objects else []
    elsewhere = [key for key in keys if key.partition("/")[2] == name]
    if elsewhere:
        other = elsewhere[0].partition("/")[0]
        return Reason(
            code="WrongNamespace",
            message=f"namespace {namespace} has no Service {name}, but namespace {other} has one",
            details=tuple(f"also: {key}" for key in elsewhere[1:4]),
            fix=f"use {elsewhere[0]}; clients in other namespaces use the name {name}.{other}",
        )
    names = [key.partition("/")[2] for key in keys if key.partition("/")[0] == namespace]
    close = [f"{namespace}/{each}" for each in get_close_matches(name, names, 1)] or get_close_matches(
        facts.key, keys, 1
    )
    details = (f"closest name: {close[0]}",) if close else ()
    if not names:
        details = (*details, f"namespace {namespace} has no Services" + (" in the files" if not facts.live else ""))
    fix = f"use {close[0]}, or create the Service" if close else "create the Service, or correct its name"
    return Reason(code="NoSuchService", message=f"there is no Service {facts.key}", details=details, fix=fix)
