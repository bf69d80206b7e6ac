"""Authorization: the subset of RBAC for ClusterRoles that are bound to service accounts."""

from __future__ import annotations

from tests.migration.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, SERVICE_ACCOUNTS, Object, RequestTarget
from tests.migration.store import ClusterStore, key_of

ADMIN = "kubernetes-admin"
PREFIX = "system:serviceaccount:"


def token_of(account: Object) -> str:
    """Return the token of a service account. It is valid as long as the account exists."""
    return f"{key_of(account)}/{account['metadata']['uid']}"


def user_of(store: ClusterStore, token: str) -> str:
    """Return the user of a token, or "" if the token is invalid."""
    if token == ADMIN:
        return ADMIN
    owner = next((each for each in store.all(SERVICE_ACCOUNTS) if token_of(each) == token), None)
    return PREFIX + key_of(owner).replace("/", ":") if owner else ""


def allowed(store: ClusterStore, user: str, verb: str, target: RequestTarget) -> bool:
    """Return whether a ClusterRole that is bound to the user has a matching rule."""
    if user == ADMIN:
        return True
    bindings = [each for each in store.all(CLUSTER_ROLE_BINDINGS) if user in map(_user, each.get("subjects", ()))]
    names = {each["roleRef"]["name"] for each in bindings}
    roles = [each for each in store.all(CLUSTER_ROLES) if each["metadata"]["name"] in names]
    return any(_matches(rule, verb, target) for role in roles for rule in role["rules"])


def verb_of(method: str, target: RequestTarget, *, watch: bool) -> str:
    """Return the verb of a request (RequestInfo of k8s.io/apiserver)."""
    if method == "GET":
        return "get" if target.name else "watch" if watch else "list"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]


def _user(subject: Object) -> str:
    return f"{PREFIX}{subject['namespace']}:{subject['name']}" if subject["kind"] == "ServiceAccount" else ""


def _matches(rule: Object, verb: str, target: RequestTarget) -> bool:
    resource = target.resource
    checks = (rule["apiGroups"], resource.group), (rule["resources"], resource.plural), (rule["verbs"], verb)
    return "resourceNames" not in rule and all(value in allowed_values for allowed_values, value in checks)
