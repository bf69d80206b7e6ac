"""The resources of the API server, their discovery, and the part of OpenAPI that kubectl requests."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from tests.apiserver.resources import RESOURCES, Resource

Object = dict[str, Any]

DAEMON_SETS = Resource("apps", "v1", "daemonsets", "DaemonSet")
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")
ACCESS = "rbac.authorization.k8s.io"
CLUSTER_ROLES = Resource(ACCESS, "v1", "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_ROLE_BINDINGS = Resource(ACCESS, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False)

CONFIG_MAPS = next(item for item in RESOURCES if item.plural == "configmaps")
PODS = next(item for item in RESOURCES if item.plural == "pods")
ALL = (*RESOURCES, DAEMON_SETS, SERVICE_ACCOUNTS, CLUSTER_ROLES, CLUSTER_ROLE_BINDINGS)
SHORT = {"daemonsets": ["ds"]}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]

_PATH = re.compile(r"(/api/v1|/apis/[^/]+/[^/]+)(?:/namespaces/([^/]+)(?=/))?/([^/]+)(?:/([^/]+))?(?:/([^/]+))?")


class RequestTarget(NamedTuple):
    """The target of a request path. Parts that are not in the path are ""."""

    resource: Resource
    namespace: str
    name: str
    subresource: str


def resource_of(body: Object) -> Resource:
    """Return the resource of an object."""
    return next(item for item in ALL if (item.api_version, item.kind) == (body["apiVersion"], body["kind"]))


def find(path: str) -> RequestTarget | None:
    """Return the target of a path, or None if the resource does not exist."""
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    root, namespace, plural, name, subresource = (part or "" for part in match.groups())
    resource = next((item for item in ALL if (item.root, item.plural) == (root, plural)), None)
    return RequestTarget(resource, namespace, name, subresource) if resource else None


def discovery(path: str) -> Object | None:
    """Return the response to a request for discovery or OpenAPI; None for any other path."""
    roots = {item.root: item.api_version for item in ALL}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()}
    if path in roots:
        resources = [_api_resource(item) for item in ALL if item.root == path]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": roots[path], "resources": resources}
    if path == "/openapi/v3":
        return {"paths": {root[1:]: {"serverRelativeURL": f"{path}{root}"} for root in roots}}
    root = path.removeprefix("/openapi/v3")
    return _openapi(root) if root in roots else None


def _groups() -> list[Object]:
    names = dict.fromkeys(item.group for item in ALL if item.group)
    versions = {name: {"groupVersion": f"{name}/v1", "version": "v1"} for name in names}
    return [{"name": name, "versions": [each], "preferredVersion": each} for name, each in versions.items()]


def _api_resource(resource: Resource) -> Object:
    return {
        "name": resource.plural,
        "singularName": resource.kind.lower(),
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": VERBS,
        "shortNames": SHORT.get(resource.plural, []),
    }


def _openapi(root: str) -> Object:
    """Declare server-side field validation for every kind. Without it, kubectl downloads all schemas."""
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    paths = {}
    for item in (each for each in ALL if each.root == root):
        kind = {"group": item.group, "version": item.version, "kind": item.kind}
        patch = {"parameters": [parameter], "x-kubernetes-group-version-kind": kind, "responses": {}}
        paths[item.object_path("{namespace}", "{name}")] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.36.0"}, "paths": paths}
