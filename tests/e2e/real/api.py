"""A client of a real API server. Objects are dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import config
from kubernetes.client import Configuration
from kubernetes.client.rest import RESTClientObject

from tests.e2e.cluster import Object

FIELD_MANAGER = "kproxy-e2e"
TIMEOUT = urllib3.Timeout(connect=10.0, read=60.0)
RETRIES = urllib3.Retry(total=5, backoff_factor=0.5, status_forcelist=[429, 503], allowed_methods=None)
"""Retry on busy servers and broken connections. All requests here may be repeated."""

COLLECTIONS = {
    "Service": ("/api/v1", "services"),
    "Pod": ("/api/v1", "pods"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "EndpointSlice": ("/apis/discovery.k8s.io/v1", "endpointslices"),
    "DaemonSet": ("/apis/apps/v1", "daemonsets"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "Event": ("/apis/events.k8s.io/v1", "events"),
}
"""The API root and plural of each namespaced kind."""

NODES = "/api/v1/nodes"
NAMESPACES = "/api/v1/namespaces"


class ApiError(Exception):
    """A request failed with this HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def object_path(kind: str, namespace: str, name: str = "") -> str:
    """Return the path of an object or, without a name, of all objects of a kind in a namespace."""
    root, plural = COLLECTIONS[kind]
    path = f"{root}/namespaces/{namespace}/{plural}"
    return f"{path}/{name}" if name else path


class Api:
    """An API client. All methods raise `ApiError`, or `urllib3.exceptions.HTTPError` if there is no answer."""

    def __init__(self, kubeconfig: str) -> None:
        """Load a kubeconfig (several separated by `:`). Raises the errors of the `kubernetes` package."""
        self.configuration = Configuration()
        config.load_kube_config(kubeconfig, client_configuration=self.configuration, persist_config=False)
        self._pool = RESTClientObject(self.configuration).pool_manager

    def get(self, path: str) -> Object:
        """Return an object."""
        return self._object("GET", path)

    def find(self, path: str) -> Object | None:
        """Return an object, or None if it does not exist."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def items(self, path: str, **selectors: str) -> list[Object]:
        """Return the objects at a path, filtered by `labelSelector` and `fieldSelector`."""
        found: list[Object] = self._object("GET", path, selectors)["items"]
        return found

    def text(self, path: str, **params: str) -> str:
        """Return a text such as a log."""
        return self._request("GET", path, params).decode(errors="replace")

    def create(self, path: str, body: Object, *, dry_run: bool = False) -> Object:
        """Create an object; in a dry run, only return what the server would create."""
        return self._object("POST", path, {"dryRun": "All"} if dry_run else {}, body)

    def apply(self, path: str, body: Object) -> Object:
        """Create or update an object by server-side apply."""
        params = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return self._object("PATCH", path, params, body, "application/apply-patch+yaml")

    def merge(self, path: str, patch: Object) -> Object:
        """Apply a JSON merge patch (RFC 7396): fields that are None are removed."""
        return self._object("PATCH", path, {}, patch, "application/merge-patch+json")

    def strategic(self, path: str, patch: Object) -> Object:
        """Apply a strategic merge patch, which merges lists by their key."""
        return self._object("PATCH", path, {}, patch, "application/strategic-merge-patch+json")

    def delete(self, path: str, grace: int | None = None) -> None:
        """Delete an object with a grace period in seconds. A missing object is not an error."""
        params = {} if grace is None else {"gracePeriodSeconds": str(grace)}
        try:
            self._request("DELETE", path, params)
        except ApiError as error:
            if error.status != 404:
                raise

    def _object(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        found: Object = json.loads(self._request(method, path, params or {}, body, content_type))
        return found

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> bytes:
        url = self.configuration.host.rstrip("/") + path + (f"?{urlencode(params)}" if params else "")
        headers = self._authentication() | {"Content-Type": content_type}
        sent = None if body is None else json.dumps(body).encode()
        answer: Any = self._pool.request(method, url, body=sent, headers=headers, timeout=TIMEOUT, retries=RETRIES)
        if answer.status >= 300:
            raise ApiError(answer.status, f"{method} {path}: {answer.status} {_reason(answer.data)}")
        data: bytes = answer.data
        return data

    def _authentication(self) -> dict[str, str]:
        settings = self.configuration.auth_settings()
        return {item["key"].title(): item["value"].strip() for item in settings.values() if item.get("value")}


def _reason(data: bytes) -> str:
    """Return the message of a Status, or the beginning of any other body."""
    try:
        found = json.loads(data)
    except ValueError:
        return data[:300].decode(errors="replace")
    return str(found.get("message", found) if isinstance(found, dict) else found)
