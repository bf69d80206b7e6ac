"""Status objects as kube-apiserver sends them, verbatim where they are recorded."""

from __future__ import annotations

from typing import Any

_EXPIRED = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list "
    "without the continue parameter, or use the continue token in this response to retrieve the remainder of "
    "the results. Continuing with the provided token results in an inconsistent list - objects that were "
    "created, modified, or deleted between the time the first chunk was returned and now may show up in the "
    "list."
)


OTHER_NAMESPACE = "the namespace of the provided object does not match the namespace sent on the request"


def status(code: int, reason: str, message: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        **more,
        "code": code,
    }


NO_RESOURCE = status(404, "NotFound", "the server could not find the requested resource", details={})


def forbidden(plural: str, group: str, verb: str) -> dict[str, Any]:
    """Return the Status for a service account whose roles lack a permission."""
    name = f"{plural}.{group}" if group else plural
    message = (
        f'{name} is forbidden: User "system:serviceaccount:kube-system:kube-proxy" cannot {verb} resource "{plural}" '
        f'in API group "{group}" at the cluster scope'
    )
    return status(403, "Forbidden", message, details={"group": group, "kind": plural})


def error(code: int, retry_after: int | None) -> dict[str, Any]:
    """Return the Status for an HTTP status code that a test asked for."""
    if code == 403:
        message = (
            'services is forbidden: User "system:anonymous" cannot list resource "services" in API group "" at '
            "the cluster scope"
        )
        return status(403, "Forbidden", message, details={"kind": "services"})
    texts = {
        400: ("BadRequest", "the request is invalid"),
        401: ("Unauthorized", "Unauthorized"),
        410: ("Expired", "The resourceVersion for the provided watch is too old."),
        406: ("NotAcceptable", "only the following media types are accepted: application/json"),
        429: ("TooManyRequests", "too many requests, please try again later"),
        503: ("ServiceUnavailable", "apiserver not ready"),
    }
    reason, message = texts.get(code, ("InternalError", "an error on the server"))
    details = {} if retry_after is None else {"details": {"retryAfterSeconds": retry_after}}
    return status(code, reason, message, **details)


def invalid(kind: str, group: str, name: str, problems: list[str]) -> dict[str, Any]:
    text = problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"
    details = {"name": name, "group": group, "kind": kind}
    return status(422, "Invalid", f'{kind}.{group} "{name}" is invalid: {text}', details=details)


def expired_continue(token: str) -> dict[str, Any]:
    return status(410, "Expired", _EXPIRED) | {"metadata": {"continue": token}}


def watch_list_forbidden(message: str) -> dict[str, Any]:
    cause = {"reason": "FieldValueForbidden", "message": f"Forbidden: {message}", "field": "sendInitialEvents"}
    text = f'ListOptions.meta.k8s.io "" is invalid: sendInitialEvents: Forbidden: {message}'
    details = {"group": "meta.k8s.io", "kind": "ListOptions", "causes": [cause]}
    return status(422, "Invalid", text, details=details)


OLD_ETCD = status(
    500,
    "InternalError",
    "a watch stream was requested by the client but the required storage feature RequestWatchProgress is disabled",
)
