"""A report of the state of a cluster, for people, after a failure."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from urllib3.exceptions import HTTPError

from tests.e2e.cluster import Object
from tests.e2e.real.api import Api, ApiError, object_path
from tests.e2e.real.proxies import RealProxies

LOG_LINES = 40


def diagnosis(api: Api, proxies: RealProxies, namespace: str) -> str:
    """Return the namespace's objects and the proxies' logs, or why they cannot be read."""
    try:
        return "\n".join(_parts(api, proxies, namespace))
    except (ApiError, HTTPError) as error:
        return f"cannot read the state of the cluster: {error}"


def _parts(api: Api, proxies: RealProxies, namespace: str) -> Iterator[str]:
    for kind in ("Service", "EndpointSlice"):
        for found in api.items(object_path(kind, namespace)):
            yield f"--- {kind}\n{yaml.safe_dump(_without_noise(found), sort_keys=False)}"
    for pod in api.items(object_path("Pod", namespace)):
        yield f"--- Pod {_pod_line(pod)}"
    for event in api.items(object_path("Event", namespace)):
        if event.get("type") != "Normal":
            yield f"--- Event {event.get('regarding', {}).get('name')}: {event.get('reason')}: {event.get('note')}"
    for node, log in proxies.logs(LOG_LINES):
        yield f"--- kproxy on {node}\n{log}"


def _without_noise(found: Object) -> Object:
    metadata = {key: value for key, value in found["metadata"].items() if key in {"name", "labels", "generation"}}
    return found | {"metadata": metadata}


def _pod_line(pod: Object) -> str:
    status = pod.get("status", {})
    conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
    deleted = pod["metadata"].get("deletionTimestamp", "")
    return (
        f"{pod['metadata']['name']} on {pod['spec'].get('nodeName')}: {status.get('phase')}, "
        f"addresses {[each['ip'] for each in status.get('podIPs') or []]}, ready {conditions.get('Ready')}"
        + (f", deleted {deleted}" if deleted else "")
    )
