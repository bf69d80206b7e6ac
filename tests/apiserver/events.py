"""Validate Events written through `events.k8s.io/v1`, as kube-apiserver does."""

from __future__ import annotations

import re
from typing import Any

_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_REQUIRED = ("reportingController", "reportingInstance", "action", "reason")
_LIMITS = {"reportingInstance": 128, "action": 128, "reason": 128, "note": 1024}


def event_problems(event: dict[str, Any]) -> list[str]:
    """Return the validation errors of an Event; none if it is valid."""
    name, namespace = event["metadata"].get("name", ""), event["metadata"]["namespace"]
    problems = [f"{field}: Required value" for field in _REQUIRED if not event.get(field)]
    for field, limit in _LIMITS.items():
        if len(event.get(field, "").encode()) > limit:
            problems.append(f"{field}: can have at most {limit} characters")
    if len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        problems.append(f"metadata.name: Invalid value: {name!r}")
    if not _MICRO_TIME.fullmatch(event.get("eventTime") or ""):
        problems.append("eventTime: Required value")
    if event.get("type") not in {"Normal", "Warning"}:
        problems.append(f"type: has invalid value: {event.get('type')}")
    if not event.get("regarding", {}).get("namespace") and namespace not in {"default", "kube-system"}:
        problems.append("involvedObject.namespace: does not match event.namespace")
    return problems + _series_problems(event.get("series"))


def _series_problems(series: dict[str, Any] | None) -> list[str]:
    if series is None:
        return []
    problems = [] if series.get("count", 0) >= 2 else ["series.count: should be at least 2"]
    if not _MICRO_TIME.fullmatch(series.get("lastObservedTime") or ""):
        problems.append("series.lastObservedTime: Required value")
    return problems
