"""The objects that the tests create, and parsers of the objects that they read."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address

from tests.e2e.cluster import HTTP_PORT, UDP_PORT, IpFamily, Node, Object, Pod

DEFAULT_IMAGE = "registry.k8s.io/e2e-test-images/agnhost:2.53"
"""The image of the Kubernetes e2e tests. A replacement must provide:

- `/agnhost netexec`: answers `/hostname`, `/clientip` and `/healthz` over HTTP, `hostname` and `clientip` over UDP,
  and serves `--delay-shutdown` seconds longer after SIGTERM;
- `/agnhost pause`: does nothing until it is terminated;
- bash with /dev/udp, curl, dig, and dd, timeout, grep, mktemp and touch (those of busybox suffice).
"""

GRACE = 5
"""Seconds that a deleted pod keeps serving, unless the test sets another grace period."""

FOREVER = 3600
"""Seconds that a pod serves after SIGTERM. SIGKILL at the end of its grace period comes first."""

UNREADY_FILE = "/tmp/unready"
ZONE = "topology.kubernetes.io/zone"
ANY_TAINT = [{"operator": "Exists"}]
"""Tolerate all taints: they are for regular workloads, and the tests put few pods on each node."""

PROBE_TIMEOUT = {"periodSeconds": 1, "timeoutSeconds": 5}


def namespace(name: str) -> Object:
    """Return a Namespace that allows privileged pods."""
    labels = {"pod-security.kubernetes.io/enforce": "privileged"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def serving_pod(name: str, node: str, image: str, labels: Mapping[str, str]) -> Object:
    """Return a pod that serves both ports until its grace period ends; `UNREADY_FILE` makes it unready."""
    flags = (f"--http-port={HTTP_PORT}", f"--udp-port={UDP_PORT}", f"--delay-shutdown={FOREVER}")
    container = {
        "name": "main",
        "image": image,
        "command": ["/agnhost", "netexec", *flags],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "udp", "containerPort": UDP_PORT, "protocol": "UDP"},
        ],
        # /healthz succeeds only once the UDP server runs too.
        "startupProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "failureThreshold": 120} | PROBE_TIMEOUT,
        "readinessProbe": {"exec": {"command": ["test", "!", "-e", UNREADY_FILE]}, "failureThreshold": 1}
        | PROBE_TIMEOUT,
    }
    return _pod(name, node, labels, container)


def client_pod(name: str, node: str, image: str, *, host_network: bool) -> Object:
    """Return a pod that only runs commands."""
    own = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if host_network else {}
    return _pod(name, node, {}, {"name": "main", "image": image, "command": ["/agnhost", "pause"]}, **own)


def agent_pod(name: str, node: str, image: str) -> Object:
    """Return a privileged pod with the node's network and processes."""
    privileged = {"securityContext": {"privileged": True}}
    container = {"name": "main", "image": image, "command": ["/agnhost", "pause"]} | privileged
    return _pod(name, node, {}, container, hostNetwork=True, hostPID=True, dnsPolicy="Default")


def _pod(name: str, node: str, labels: Mapping[str, str], container: Object, **more: object) -> Object:
    spec = {
        "nodeName": node,
        "tolerations": ANY_TAINT,
        "terminationGracePeriodSeconds": GRACE,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "containers": [{"imagePullPolicy": "IfNotPresent"} | container],
    }
    metadata = {"name": name, "labels": dict(labels)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec | more}


def dual_stack_trial() -> Object:
    """Return a Service whose dry run shows the IP families of the cluster."""
    spec = {"ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 80}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"generateName": "kproxy-e2e-"}, "spec": spec}


def by_family(addresses: list[str]) -> dict[IpFamily, str]:
    """Return the first address of each family."""
    found: dict[IpFamily, str] = {}
    for address in addresses:
        found.setdefault(family_of(address), address)
    return found


def family_of(address: str) -> IpFamily:
    """Return the family of an address."""
    return "IPv6" if ip_address(address).version == 6 else "IPv4"


def usable_nodes(found: list[Object]) -> list[Node]:
    """Return the ready and schedulable Linux nodes by name. Tainted ones are used only if there are no others."""
    schedulable = [
        node for node in found if is_ready(node) and not node["spec"].get("unschedulable") and _runs_linux(node)
    ]
    untainted = [node for node in schedulable if not _is_tainted(node)]
    return sorted((_node(node) for node in untainted or schedulable), key=lambda node: node.name)


def is_ready(found: Object) -> bool:
    """Return whether a Node or a Pod has the condition `Ready` and is not being deleted."""
    conditions = found.get("status", {}).get("conditions") or []
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return ready and "deletionTimestamp" not in found["metadata"]


def pod_of(found: Object) -> Pod:
    """Convert a Pod object."""
    addresses = [each["ip"] for each in found["status"].get("podIPs") or []]
    return Pod(found["metadata"]["name"], found["spec"]["nodeName"], by_family(addresses))


def _node(found: Object) -> Node:
    internal = [each["address"] for each in found["status"]["addresses"] if each["type"] == "InternalIP"]
    labels = found["metadata"].get("labels") or {}
    return Node(found["metadata"]["name"], by_family(internal), labels.get(ZONE, ""))


def _runs_linux(found: Object) -> bool:
    labels = found["metadata"].get("labels") or {}
    return bool(labels.get("kubernetes.io/os", "linux") == "linux")


def _is_tainted(found: Object) -> bool:
    effects = {taint["effect"] for taint in found["spec"].get("taints") or []}
    return not effects.isdisjoint({"NoSchedule", "NoExecute"})
