"""Who may do what: the part of RBAC that ClusterRoles for service accounts need."""

from __future__ import annotations

from tests.migration.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, SERVICE_ACCOUNTS, Object, Place
from tests.migration.store import ClusterStore, key_of

ADMIN = "kubernetes-admin"
PREFIX = "system:serviceaccount:"


def token_of(account: Object) -> str:
    """Return the token of a service account; it counts as long as the account is there."""
    return f"{key_of(account)}/{account['metadata']['uid']}"


def user_of(store: ClusterStore, token: str) -> str:
    """Return whose token this is, "" if nobody's."""
    if token == ADMIN:
        return ADMIN
    owner = next((each for each in store.all(SERVICE_ACCOUNTS) if token_of(each) == token), None)
    return PREFIX + key_of(owner).replace("/", ":") if owner else ""


def allowed(store: ClusterStore, user: str, verb: str, place: Place) -> bool:
    """Tell whether a role that is bound to the user has a rule for this."""
    if user == ADMIN:
        return True
    bindings = [each for each in store.all(CLUSTER_ROLE_BINDINGS) if user in map(_user, each.get("subjects", ()))]
    names = {each["roleRef"]["name"] for each in bindings}
    roles = [each for each in store.all(CLUSTER_ROLES) if each["metadata"]["name"] in names]
    return any(_matches(rule, verb, place) for role in roles for rule in role["rules"])


def verb_of(method: str, place: Place, *, watch: bool) -> str:
    """Return the verb of a request (RequestInfo of k8s.io/apiserver)."""
    if method == "GET":
        return "get" if place.name else "watch" if watch else "list"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[method]


def _user(subject: Object) -> str:
    return f"{PREFIX}{subject['namespace']}:{subject['name']}" if subject["kind"] == "ServiceAccount" else ""


def _matches(rule: Object, verb: str, place: Place) -> bool:
    resource = place.resource
    wanted = (rule["apiGroups"], resource.group), (rule["resources"], resource.plural), (rule["verbs"], verb)
    return "resourceNames" not in rule and all(name in names for names, name in wanted)
