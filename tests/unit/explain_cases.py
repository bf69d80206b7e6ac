"""Set-ups of Services, sound and broken, as files of objects. Each broken one has one reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kproxy.diagnose.explain_report import ReasonCode, Verdict

NODES = """
apiVersion: v1
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDRs: [10.244.1.0/24, "fd00:10:244:1::/64"]}
status:
  addresses: [{type: InternalIP, address: 192.168.0.11}, {type: InternalIP, address: "fd00::11"}]
---
apiVersion: v1
kind: Node
metadata: {name: node-2, labels: {topology.kubernetes.io/zone: b}}
spec: {podCIDRs: [10.244.2.0/24, "fd00:10:244:2::/64"]}
status:
  addresses: [{type: InternalIP, address: 192.168.0.12}, {type: InternalIP, address: "fd00::12"}]
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec:
  type: ClusterIP
  clusterIP: 10.96.0.82
  clusterIPs: [10.96.0.82]
  ipFamilies: [IPv4]
  selector: {app: api}
  ports:
  - {name: http, port: 80, protocol: TCP, targetPort: http}
"""
NODE_PORT = SERVICE.replace("type: ClusterIP", "type: NodePort").replace(
    "targetPort: http}", "targetPort: http, nodePort: 30080}"
)
BALANCER = (
    NODE_PORT.replace("type: NodePort", "type: LoadBalancer")
    + """
status: {loadBalancer: {ingress: [{ip: 203.0.113.80}]}}
"""
)
DUAL_STACK = SERVICE.replace("clusterIPs: [10.96.0.82]", 'clusterIPs: [10.96.0.82, "fd00:96::82"]').replace(
    "ipFamilies: [IPv4]", "ipFamilies: [IPv4, IPv6]"
)
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: api-x7k2p
  namespace: shop
  labels: {kubernetes.io/service-name: api, endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io}
addressType: IPv4
endpoints:
- {addresses: [10.244.1.5], conditions: {ready: true, serving: true, terminating: false}, nodeName: node-1, zone: a}
- {addresses: [10.244.2.5], conditions: {ready: true, serving: true, terminating: false}, nodeName: node-2, zone: b}
ports: [{name: http, port: 8080, protocol: TCP}]
"""
SLICE_IPV6 = (
    SLICE.replace("addressType: IPv4", "addressType: IPv6")
    .replace("api-x7k2p", "api-v6abc")
    .replace("[10.244.1.5]", '["fd00:10:244:1::5"]')
    .replace("[10.244.2.5]", '["fd00:10:244:2::5"]')
)
NO_PORTS_SLICE = SLICE.replace("ports: [{name: http, port: 8080, protocol: TCP}]", "ports: []")
EMPTY_SLICE = SLICE[: SLICE.index("endpoints:\n")] + "endpoints: []\nports: []\n"
PODS = """
apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: shop, labels: {app: api}}
spec:
  nodeName: node-1
  containers: [{name: server, ports: [{name: http, containerPort: 8080}, {name: metrics, containerPort: 9090}]}]
status:
  phase: Running
  podIP: 10.244.1.5
  conditions: [{type: Ready, status: "True"}]
  containerStatuses: [{name: server, ready: true, state: {running: {}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: api-2, namespace: shop, labels: {app: api}}
spec:
  nodeName: node-2
  containers: [{name: server, ports: [{name: http, containerPort: 8080}, {name: metrics, containerPort: 9090}]}]
status:
  phase: Running
  podIP: 10.244.2.5
  conditions: [{type: Ready, status: "True"}]
  containerStatuses: [{name: server, ready: true, state: {running: {}}}]
"""
UNREADY_SLICE = SLICE.replace("ready: true, serving: true", "ready: false, serving: false")
UNREADY_PODS = PODS.replace('status: "True"', 'status: "False"').replace("ready: true", "ready: false")
CRASHING_PODS = UNREADY_PODS.replace("{running: {}}", "{waiting: {reason: CrashLoopBackOff}}")
TERMINATING_SLICE = SLICE.replace(
    "ready: true, serving: true, terminating: false", "ready: false, serving: false, terminating: true"
)
DRAINING_SLICE = SLICE.replace(
    "ready: true, serving: true, terminating: false", "ready: false, serving: true, terminating: true"
)
REMOTE_SLICE = SLICE.replace("nodeName: node-1", "nodeName: node-2")
ZONE_HINTS = SLICE.replace("zone: a}", "zone: b, hints: {forZones: [{name: b}]}}").replace(
    "zone: b}\nports", "zone: b, hints: {forZones: [{name: b}]}}\nports"
)
OTHER = """
apiVersion: v1
kind: Service
metadata: {name: aaa, namespace: shop}
spec:
  type: ClusterIP
  clusterIP: 10.96.0.90
  clusterIPs: [10.96.0.90]
  ports: [{port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: aaa-1, namespace: shop, labels: {kubernetes.io/service-name: aaa}}
addressType: IPv4
endpoints: [{addresses: [10.244.1.9], conditions: {ready: true}, nodeName: node-1}]
ports: [{port: 8080}]
"""
IPV6_DRAINING = SLICE_IPV6.replace(
    "ready: true, serving: true, terminating: false", "ready: false, serving: true, terminating: true"
)
EXTERNAL_SLICE = SLICE.replace("10.244.1.5", "203.0.113.50").replace(", nodeName: node-1", "")
BALANCER_STATUS = "status: {loadBalancer: {ingress: [{ip: 203.0.113.80}]}}\n"
LOCAL_DUAL_STACK = (
    DUAL_STACK.replace("type: ClusterIP", "type: NodePort")
    .replace("targetPort: http}", "targetPort: http, nodePort: 30080}")
    .replace("  selector:", "  externalTrafficPolicy: Local\n  selector:")
)
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress]}
"""


def edit(text: str, old: str, new: str) -> str:
    """Return a text with a part replaced that must be in it."""
    assert old in text, f"{old!r} is not in:\n{text}"
    return text.replace(old, new)


def without(text: str, part: str) -> str:
    return edit(text, part, "")


def no_pods(text: str, *parts: str) -> str:
    return "---".join((NODES, text, *parts))


def cluster(*parts: str) -> str:
    return "---".join((NODES, *parts))


def no_cidrs(*parts: str) -> str:
    """Return a cluster whose network plugin does not use the pod networks of Nodes."""
    return re.sub(r"spec: {podCIDRs: .*}", "spec: {}", cluster(*parts))


@dataclass(frozen=True)
class SetUp:
    """A cluster in YAML, and what must be said about shop/api on node-1: the verdict, and the one reason, if any.

    `text` must be part of the reason. `notes` are the codes of all expected notes.
    """

    name: str
    yaml: str
    verdict: Verdict
    code: ReasonCode | None = None
    text: str = ""
    flags: tuple[str, ...] = ()
    key: str = "shop/api"
    client: str = ""
    notes: frozenset[str] = field(default_factory=frozenset)


BROKEN = [
    SetUp(
        "misspelled name", cluster(SERVICE, SLICE, PODS), "NOT PROGRAMMED", "NoSuchService", "shop/api", key="shop/apo"
    ),
    SetUp(
        "other namespace", cluster(SERVICE, SLICE, PODS), "NOT PROGRAMMED", "WrongNamespace", "shop", key="default/api"
    ),
    SetUp(
        "invalid port",
        cluster(edit(SERVICE, "port: 80,", 'port: "http",'), SLICE, PODS),
        "NOT PROGRAMMED",
        "InvalidObject",
        "spec.ports[0].port",
    ),
    SetUp(
        "port out of range",
        cluster(edit(SERVICE, "port: 80,", "port: 80000,"), SLICE, PODS),
        "NOT PROGRAMMED",
        "InvalidObject",
        "from 1 to 65535",
    ),
    SetUp(
        "invalid source range",
        cluster(edit(BALANCER, "  selector:", "  loadBalancerSourceRanges: [10.0.0.0/99]\n  selector:"), SLICE, PODS),
        "NOT PROGRAMMED",
        "InvalidObject",
        "loadBalancerSourceRanges",
    ),
    SetUp(
        "no ports",
        cluster(SERVICE[: SERVICE.index("  ports:")], SLICE, PODS),
        "NOT PROGRAMMED",
        "InvalidObject",
        "spec.ports is empty",
    ),
    SetUp(
        "other service proxy",
        cluster(
            edit(
                SERVICE,
                "namespace: shop}",
                "namespace: shop, labels: {service.kubernetes.io/service-proxy-name: cilium}}",
            ),
            SLICE,
            PODS,
        ),
        "NOT PROGRAMMED",
        "ManagedElsewhere",
        "cilium",
    ),
    SetUp(
        "slices of another service proxy",
        cluster(
            SERVICE,
            edit(SLICE, "labels: {", "labels: {service.kubernetes.io/service-proxy-name: cilium, "),
            PODS,
        ),
        "REJECTED",
        "ManagedElsewhere",
        "EndpointSlices",
    ),
    SetUp(
        "ExternalName",
        cluster(
            edit(
                edit(SERVICE, "type: ClusterIP", "type: ExternalName\n  externalName: db.example.com"),
                "  clusterIP: 10.96.0.82\n  clusterIPs: [10.96.0.82]\n",
                "",
            )
        ),
        "NOT PROGRAMMED",
        "ExternalName",
        "db.example.com",
    ),
    SetUp(
        "headless",
        cluster(SERVICE.replace("10.96.0.82", "None"), SLICE, PODS),
        "NOT PROGRAMMED",
        "Headless",
        "headless",
    ),
    SetUp(
        "headless, and nothing else is right either",
        cluster(edit(SERVICE.replace("10.96.0.82", "None"), "app: api", "app: nothing"), EMPTY_SLICE, PODS),
        "NOT PROGRAMMED",
        "Headless",
        "headless",
    ),
    SetUp(
        "no ClusterIP allocated",
        cluster(without(SERVICE, "  clusterIP: 10.96.0.82\n  clusterIPs: [10.96.0.82]\n"), SLICE, PODS),
        "NOT PROGRAMMED",
        "ClusterIPPending",
    ),
    SetUp(
        "misspelled selector",
        cluster(edit(SERVICE, "app: api", "app: apis"), EMPTY_SLICE, PODS),
        "REJECTED",
        "SelectorMatchesNothing",
        'set spec.selector.app to "api"',
    ),
    SetUp(
        "one label too many in the selector",
        cluster(edit(SERVICE, "{app: api}", "{app: api, tier: web}"), EMPTY_SLICE, PODS),
        "REJECTED",
        "SelectorMatchesNothing",
        "tier=web",
    ),
    SetUp(
        "pods in another namespace",
        cluster(SERVICE, EMPTY_SLICE, PODS.replace("namespace: shop", "namespace: prod")),
        "REJECTED",
        "SelectorMatchesNothing",
        "prod",
    ),
    SetUp(
        "misspelled port name",
        cluster(edit(SERVICE, "targetPort: http", "targetPort: htp"), NO_PORTS_SLICE, PODS),
        "REJECTED",
        "TargetPortUnresolved",
        'to "http"',
    ),
    SetUp(
        "port name of another protocol",
        cluster(edit(SERVICE, "protocol: TCP", "protocol: UDP"), NO_PORTS_SLICE, PODS),
        "REJECTED",
        "TargetPortUnresolved",
        "UDP",
    ),
    SetUp(
        "port without a name in the pods",
        cluster(SERVICE, NO_PORTS_SLICE, PODS.replace("name: http, ", "")),
        "REJECTED",
        "TargetPortUnresolved",
    ),
    SetUp(
        "misspelled port name, and the pods are not ready",
        cluster(
            edit(SERVICE, "targetPort: http", "targetPort: htp"),
            edit(UNREADY_SLICE, "ports: [{name: http, port: 8080, protocol: TCP}]", "ports: []"),
            CRASHING_PODS,
        ),
        "REJECTED",
        "TargetPortUnresolved",
        'to "http"',
    ),
    SetUp(
        "slice written by hand with another port name",
        no_pods(without(SERVICE, "  selector: {app: api}\n"), edit(SLICE, "name: http, port", "name: web, port")),
        "REJECTED",
        "TargetPortUnresolved",
        '"web"',
    ),
    SetUp(
        "no selector and no slice",
        no_pods(without(SERVICE, "  selector: {app: api}\n"), OTHER),
        "REJECTED",
        "NoEndpoints",
        "no selector",
    ),
    SetUp(
        "ready pods in no slice", cluster(SERVICE, PODS, OTHER), "REJECTED", "NoEndpoints", "kube-controller-manager"
    ),
    SetUp(
        "slice without the label",
        no_pods(without(SERVICE, "  selector: {app: api}\n"), edit(SLICE, "kubernetes.io/service-name: api, ", "")),
        "REJECTED",
        "NoEndpoints",
        "kubernetes.io/service-name",
    ),
    SetUp("empty slice, pods unseen", no_pods(SERVICE, EMPTY_SLICE), "REJECTED", "NoEndpoints", "list no endpoints"),
    SetUp(
        "crashing pods", cluster(SERVICE, UNREADY_SLICE, CRASHING_PODS), "REJECTED", "PodsNotReady", "CrashLoopBackOff"
    ),
    SetUp(
        "failing readiness probe",
        cluster(SERVICE, UNREADY_SLICE, UNREADY_PODS),
        "REJECTED",
        "PodsNotReady",
        "readiness probe",
    ),
    SetUp(
        "pods that cannot be scheduled",
        cluster(
            SERVICE,
            EMPTY_SLICE,
            UNREADY_PODS.replace("podIP: 10.244.1.5", "x: 0")
            .replace("podIP: 10.244.2.5", "x: 0")
            .replace("phase: Running", "phase: Pending")
            .replace(
                "conditions: [",
                'conditions: [{type: PodScheduled, status: "False", message: 0/2 nodes are available}, ',
            ),
        ),
        "REJECTED",
        "PodsNotReady",
        "not scheduled",
    ),
    SetUp(
        "jobs that have ended",
        cluster(SERVICE, EMPTY_SLICE, UNREADY_PODS.replace("phase: Running", "phase: Succeeded")),
        "REJECTED",
        "PodsNotReady",
        "Succeeded",
    ),
    SetUp("endpoints not ready, pods unseen", no_pods(SERVICE, UNREADY_SLICE), "REJECTED", "NoReadyEndpoints"),
    SetUp(
        "slices out of date",
        cluster(SERVICE, UNREADY_SLICE, PODS),
        "REJECTED",
        "NoReadyEndpoints",
        "out of date",
    ),
    SetUp("terminating endpoints", no_pods(SERVICE, TERMINATING_SLICE), "REJECTED", "OnlyTerminating"),
    SetUp("draining endpoints", no_pods(SERVICE, DRAINING_SLICE), "DEGRADED", "OnlyTerminating", "until"),
    SetUp(
        "invalid addresses in the slice",
        no_pods(
            without(SERVICE, "  selector: {app: api}\n"),
            SLICE.replace("[10.244.1.5]", "[127.0.0.1]").replace("[10.244.2.5]", "[10.244.2.555]"),
        ),
        "REJECTED",
        "InvalidObject",
        "loopback",
    ),
    SetUp(
        "externalTrafficPolicy Local",
        cluster(edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"), REMOTE_SLICE, PODS),
        "DROPPED",
        "NoLocalEndpoints",
        "externalTrafficPolicy",
    ),
    SetUp(
        "internalTrafficPolicy Local",
        cluster(edit(SERVICE, "  selector:", "  internalTrafficPolicy: Local\n  selector:"), REMOTE_SLICE, PODS),
        "DROPPED",
        "NoLocalEndpoints",
        "internalTrafficPolicy",
    ),
    SetUp(
        "policy Local and slices without nodes",
        no_pods(
            edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"),
            SLICE.replace(", nodeName: node-1", "").replace(", nodeName: node-2", ""),
        ),
        "DROPPED",
        "NoLocalEndpoints",
        "nodeName",
    ),
    SetUp(
        "policy Local but no endpoint anywhere",
        no_pods(edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"), UNREADY_SLICE),
        "REJECTED",
        "NoReadyEndpoints",
    ),
    SetUp(
        "client outside the source ranges",
        cluster(
            edit(BALANCER, "  selector:", "  loadBalancerSourceRanges: [198.51.100.0/24]\n  selector:"), SLICE, PODS
        ),
        "DROPPED",
        "SourceNotAllowed",
        "198.51.100.0/24",
        client="203.0.113.7",
    ),
    SetUp(
        "client outside the cluster",
        cluster(SERVICE, SLICE, PODS),
        "DROPPED",
        "ReachedOnlyFromInside",
        "only a ClusterIP",
        client="203.0.113.7",
    ),
    SetUp(
        "IPv6 client of an IPv4 Service",
        cluster(SERVICE, SLICE, PODS),
        "NOT PROGRAMMED",
        "FamilyMissing",
        "IPv6",
        client="fd00:10:244:1::77",
    ),
    SetUp("no IPv6 endpoints", cluster(DUAL_STACK, SLICE, PODS), "DEGRADED", "FamilyMissing", "IPv6"),
    SetUp(
        "endpoints only of the other family",
        no_pods(SERVICE.replace("10.96.0.82", '"fd00:96::82"').replace("[IPv4]", "[IPv6]"), SLICE),
        "REJECTED",
        "FamilyMissing",
        "only IPv4 endpoints",
    ),
    SetUp(
        "NodePort of another Service",
        cluster(
            NODE_PORT,
            SLICE,
            PODS,
            edit(OTHER, "type: ClusterIP", "type: NodePort").replace(
                "ports: [{port: 80}]", "ports: [{port: 80, nodePort: 30080}]"
            ),
        ),
        "DEGRADED",
        "PortConflict",
        "shop/aaa",
    ),
    SetUp(
        "external IP of another Service",
        cluster(
            edit(SERVICE, "  selector:", "  externalIPs: [198.51.100.5]\n  selector:"),
            SLICE,
            PODS,
            edit(OTHER, "  ports:", "  externalIPs: [198.51.100.5]\n  ports:"),
        ),
        "DEGRADED",
        "AddressConflict",
        "198.51.100.5",
    ),
    SetUp(
        "external IP is the ClusterIP of another Service",
        cluster(edit(SERVICE, "  selector:", "  externalIPs: [10.96.0.90]\n  selector:"), SLICE, PODS, OTHER),
        "DEGRADED",
        "AddressConflict",
        "10.96.0.90",
    ),
    SetUp(
        "nodePortAddresses without the node",
        cluster(NODE_PORT, SLICE, PODS),
        "DEGRADED",
        "NodePortNotOnThisAddress",
        "192.168.0.11",
        flags=("--nodeport-addresses=172.16.0.0/12,fd99::/64",),
    ),
    SetUp(
        "load balancer pending",
        cluster(edit(BALANCER, "{ingress: [{ip: 203.0.113.80}]}", "{}"), SLICE, PODS),
        "DEGRADED",
        "LoadBalancerPending",
        "NodePort",
    ),
    SetUp(
        "one of two ports",
        cluster(
            SERVICE + "  - {name: admin, port: 9000, targetPort: admin}\n",
            SLICE,
            PODS,
        ),
        "DEGRADED",
        "TargetPortUnresolved",
        "admin",
    ),
    SetUp(
        "IPv6 Service, pods with IPv4 addresses",
        cluster(
            SERVICE.replace("10.96.0.82", '"fd00:96::82"').replace("[IPv4]", "[IPv6]"),
            EMPTY_SLICE.replace("addressType: IPv4", "addressType: IPv6"),
            PODS,
        ),
        "REJECTED",
        "FamilyMissing",
        "its pods have only IPv4 addresses",
    ),
    SetUp(
        "quoted port number",
        cluster(edit(SERVICE, "targetPort: http", 'targetPort: "8080"'), NO_PORTS_SLICE, PODS),
        "REJECTED",
        "TargetPortUnresolved",
        "quotes",
    ),
    SetUp(
        "slice with an invalid port",
        no_pods(without(SERVICE, "  selector: {app: api}\n"), edit(SLICE, "port: 8080", "port: 808080")),
        "REJECTED",
        "InvalidObject",
        "65535",
    ),
    SetUp(
        "slice of host names",
        no_pods(
            without(SERVICE, "  selector: {app: api}\n"),
            edit(SLICE, "addressType: IPv4", "addressType: FQDN").replace("10.244.1.5", "db.example.com"),
        ),
        "REJECTED",
        "NoEndpoints",
        "FQDN",
    ),
    SetUp(
        "one slice of two families, whose load balancer is pending",
        cluster(edit(DUAL_STACK, "type: ClusterIP", "type: LoadBalancer"), SLICE, PODS),
        "DEGRADED",
        "FamilyMissing",
        "IPv6",
    ),
    SetUp(
        "load balancer pending, without NodePorts, client outside",
        cluster(edit(SERVICE, "type: ClusterIP", "type: LoadBalancer"), SLICE, PODS),
        "DROPPED",
        "LoadBalancerPending",
        client="203.0.113.7",
    ),
    SetUp(
        "no endpoint on the client's node",
        cluster(
            edit(SERVICE, "  selector:", "  internalTrafficPolicy: Local\n  selector:"),
            SLICE.replace("nodeName: node-2", "nodeName: node-1"),
            PODS,
        ),
        "DROPPED",
        "NoLocalEndpoints",
        "is on node-2",
        client="10.244.2.77",
    ),
    SetUp(
        "client outside the source ranges, without Nodes in the files",
        "---".join(
            (edit(BALANCER, "  selector:", "  loadBalancerSourceRanges: [198.51.100.0/24]\n  selector:"), SLICE, PODS)
        ),
        "DROPPED",
        "SourceNotAllowed",
        client="203.0.113.7",
    ),
    SetUp(
        "wrong node name",
        cluster(edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"), SLICE, PODS).replace(
            "node-1", "node-1.example.com"
        ),
        "DROPPED",
        "NoLocalEndpoints",
        "--hostname-override",
    ),
    SetUp(
        "load balancer of two ports pending",
        cluster(
            edit(
                BALANCER,
                "nodePort: 30080}",
                "nodePort: 30080}\n  - {name: admin, port: 81, targetPort: http, nodePort: 30081}",
            ).replace("{ingress: [{ip: 203.0.113.80}]}", "{}"),
            edit(SLICE, "ports: [", "ports: [{name: admin, port: 8080}, "),
            PODS,
        ),
        "DEGRADED",
        "LoadBalancerPending",
    ),
    SetUp(
        "ready pods without the port of the new ones, which are not ready",
        cluster(
            edit(SERVICE, "targetPort: http", "targetPort: web"),
            UNREADY_SLICE.replace("10.244.2.5", "10.244.2.6").replace("10.244.1.5", "10.244.1.6"),
            PODS,
            CRASHING_PODS.replace("name: http", "name: web").replace("api-1", "api-3").replace("api-2", "api-4"),
        ),
        "REJECTED",
        "PodsNotReady",
        "CrashLoopBackOff",
    ),
    SetUp(
        "pods whose status says nothing",
        cluster(
            SERVICE,
            EMPTY_SLICE,
            PODS.replace('conditions: [{type: Ready, status: "True"}]', "").replace(
                "containerStatuses: [{name: server, ready: true, state: {running: {}}}]", ""
            ),
        ),
        "REJECTED",
        "NoEndpoints",
    ),
    SetUp(
        "no replicas",
        cluster(SERVICE, EMPTY_SLICE, PODS.replace("app: api", "app: web").replace("shop", "web")),
        "REJECTED",
        "SelectorMatchesNothing",
        "has no pods",
    ),
    SetUp(
        "IPv6 client of a load balancer with an IPv4 address",
        cluster(edit(DUAL_STACK, "type: ClusterIP", "type: LoadBalancer") + BALANCER_STATUS, SLICE, SLICE_IPV6),
        "NOT PROGRAMMED",
        "FamilyMissing",
        "203.0.113.80",
        client="2001:db8::7",
    ),
    SetUp(
        "client that is an endpoint outside the cluster",
        cluster(without(SERVICE, "  selector: {app: api}\n"), EXTERNAL_SLICE),
        "DROPPED",
        "ReachedOnlyFromInside",
        "an endpoint of this Service outside the cluster",
        client="203.0.113.50",
    ),
    SetUp(
        "outside client of a ClusterIP without endpoints",
        cluster(SERVICE, UNREADY_SLICE),
        "DROPPED",
        "ReachedOnlyFromInside",
        client="203.0.113.7",
    ),
    SetUp(
        "externalTrafficPolicy Local in one of two families",
        cluster(LOCAL_DUAL_STACK, SLICE, SLICE_IPV6.replace("nodeName: node-1", "nodeName: node-2")),
        "DEGRADED",
        "NoLocalEndpoints",
        "IPv6 endpoint",
    ),
    SetUp(
        "no address for NodePorts, client outside",
        cluster(NODE_PORT, SLICE, PODS),
        "NOT PROGRAMMED",
        "NodePortNotOnThisAddress",
        flags=("--nodeport-addresses=172.16.0.0/12,fd99::/64",),
        client="203.0.113.7",
    ),
    SetUp(
        "NodePort of another Service, client outside",
        cluster(
            NODE_PORT,
            SLICE,
            PODS,
            edit(OTHER, "type: ClusterIP", "type: NodePort").replace(
                "ports: [{port: 80}]", "ports: [{port: 80, nodePort: 30080}]"
            ),
        ),
        "NOT PROGRAMMED",
        "PortConflict",
        client="203.0.113.7",
    ),
    SetUp(
        "endpoints whose pods do not exist",
        cluster(SERVICE, SLICE, PODS.replace("10.244.2.5", "10.244.2.99")),
        "DEGRADED",
        "EndpointSlicesOutOfDate",
        "10.244.2.5, but no pod",
    ),
    SetUp(
        "endpoints on other nodes without the client's node",
        cluster(
            edit(SERVICE, "  selector:", "  internalTrafficPolicy: Local\n  selector:"),
            DRAINING_SLICE.replace("nodeName: node-1", "nodeName: node-2"),
        ),
        "DROPPED",
        "NoLocalEndpoints",
        "usable endpoints are on: node-2",
    ),
    SetUp(
        "another application with the same instance label",
        cluster(
            edit(SERVICE, "{app: api}", "{app: api, instance: shop}"),
            EMPTY_SLICE,
            PODS.replace("app: api", "app: redis, instance: shop"),
        ),
        "REJECTED",
        "SelectorMatchesNothing",
        "start the pods",
    ),
    SetUp(
        "pods of a newer version",
        cluster(SERVICE, EMPTY_SLICE, PODS.replace("app: api", "app: api-v2")),
        "REJECTED",
        "SelectorMatchesNothing",
        "start the pods",
    ),
    SetUp(
        "pods that cannot be scheduled, but would be published",
        cluster(
            edit(SERVICE, "  selector:", "  publishNotReadyAddresses: true\n  selector:"),
            EMPTY_SLICE,
            UNREADY_PODS.replace("podIP: 10.244.1.5", "x: 0").replace("podIP: 10.244.2.5", "x: 0"),
        ),
        "REJECTED",
        "PodsNotReady",
    ),
    SetUp(
        "one pod in no slice",
        cluster(SERVICE, PODS.partition("---")[0], OTHER),
        "REJECTED",
        "NoEndpoints",
        "1 pod matches the selector",
    ),
    SetUp(
        "the IPv6 slice of dual-stack pods is missing",
        cluster(
            DUAL_STACK,
            SLICE,
            PODS.replace("podIP: 10.244.1.5", 'podIPs: [{ip: 10.244.1.5}, {ip: "fd00:10:244:1::5"}]'),
        ),
        "DEGRADED",
        "NoEndpoints",
        "no EndpointSlice lists IPv6 endpoints",
    ),
    SetUp(
        "slices with an older name of the port",
        cluster(edit(SERVICE, "{name: http,", "{name: web,"), SLICE, PODS),
        "REJECTED",
        "TargetPortUnresolved",
        "out of date",
    ),
    SetUp(
        "startup probe",
        cluster(
            SERVICE,
            UNREADY_SLICE,
            UNREADY_PODS.replace("{name: server, ports", "{name: server, startupProbe: {}, ports").replace(
                "{name: server, ready: false", "{name: server, started: false, ready: false"
            ),
        ),
        "REJECTED",
        "PodsNotReady",
        "make the startup probe succeed",
    ),
    SetUp(
        "both traffic policies Local",
        cluster(
            edit(
                NODE_PORT,
                "  selector:",
                "  internalTrafficPolicy: Local\n  externalTrafficPolicy: Local\n  selector:",
            ),
            REMOTE_SLICE,
        ),
        "DROPPED",
        "NoLocalEndpoints",
        "set spec.internalTrafficPolicy and spec.externalTrafficPolicy to Cluster",
    ),
    SetUp(
        "load balancer with policy Local pending",
        cluster(
            edit(BALANCER, "{ingress: [{ip: 203.0.113.80}]}", "{}").replace(
                "  selector:", "  externalTrafficPolicy: Local\n  selector:"
            ),
            SLICE,
            PODS,
        ),
        "DEGRADED",
        "LoadBalancerPending",
        "the NodePort of a node with endpoints",
    ),
    SetUp(
        "slice of a Service with a longer name, without the label",
        cluster(
            without(SERVICE, "  selector: {app: api}\n"),
            edit(SLICE, "kubernetes.io/service-name: api, ", "").replace("api-x7k2p", "apis-x7k2p"),
        ),
        "REJECTED",
        "NoEndpoints",
        "create an EndpointSlice",
    ),
    SetUp(
        "pods on a node that is not ready",
        cluster(SERVICE, UNREADY_SLICE, UNREADY_PODS).replace(
            "status:\n  addresses: [{type: InternalIP, address: 192.168.0.12}",
            "status:\n  conditions: [{type: Ready, status: Unknown}]\n"
            "  addresses: [{type: InternalIP, address: 192.168.0.12}",
        ),
        "REJECTED",
        "PodsNotReady",
        "its node node-2 is not ready",
    ),
    SetUp(
        "the endpoint for clients outside is terminating",
        cluster(
            edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"),
            edit(
                SLICE,
                "[10.244.1.5], conditions: {ready: true, serving: true, terminating: false",
                "[10.244.1.5], conditions: {ready: false, serving: true, terminating: true",
            ),
        ),
        "DEGRADED",
        "OnlyTerminating",
        "its only endpoint on node-1 is terminating",
        client="203.0.113.7",
    ),
    SetUp(
        "new pods that crash while the old ones end",
        no_pods(
            SERVICE,
            DRAINING_SLICE.replace("serving: true", "serving: false"),
            PODS.replace(
                "namespace: shop, labels", "namespace: shop, deletionTimestamp: '2030-01-01T00:00:00Z', labels"
            ),
            CRASHING_PODS.replace("api-1", "api-3").replace("api-2", "api-4").replace(".5\n", ".6\n"),
        ),
        "REJECTED",
        "PodsNotReady",
        "CrashLoopBackOff",
    ),
]
SOUND = [
    SetUp(
        "NodePorts only on the loopback address",
        cluster(NODE_PORT, SLICE, PODS),
        "WORKS",
        flags=("--proxy-mode=nftables", "--nodeport-addresses=127.0.0.0/8,::1/128"),
        notes=frozenset({"NodePortNotOnThisAddress"}),
    ),
    SetUp(
        "ClusterIP is an address of a node",
        cluster(SERVICE.replace("10.96.0.82", "192.168.0.12"), SLICE, PODS),
        "WORKS",
        notes=frozenset({"ClusterIPOfNode"}),
    ),
    SetUp(
        "network policy that allows everything",
        cluster(
            SERVICE, SLICE, PODS, POLICY.replace("policyTypes: [Ingress]", "policyTypes: [Ingress], ingress: [{}]")
        ),
        "WORKS",
    ),
    SetUp(
        "IPv4 client, and the IPv6 endpoints are terminating",
        cluster(DUAL_STACK, SLICE, IPV6_DRAINING),
        "WORKS",
        client="10.244.1.77",
    ),
    SetUp(
        "IPv4 client, and another Service owns an IPv6 address",
        cluster(
            edit(DUAL_STACK, "  selector:", '  externalIPs: ["fd00:96::90"]\n  selector:'),
            SLICE,
            SLICE_IPV6,
            OTHER.replace("10.96.0.90", '"fd00:96::90"'),
        ),
        "WORKS",
        client="10.244.1.77",
    ),
    SetUp("client is this node", cluster(SERVICE, SLICE, PODS), "WORKS", client="127.0.0.1"),
    SetUp("client is a ClusterIP", cluster(SERVICE, SLICE, PODS), "WORKS", client="10.96.0.82"),
    SetUp("client and Nodes without pod networks", no_cidrs(SERVICE, SLICE), "WORKS", client="10.244.1.77"),
    SetUp("client, but no Nodes", "---".join((SERVICE, SLICE)), "WORKS", client="10.244.1.77"),
    SetUp(
        "ready endpoints whose pods are not ready",
        cluster(SERVICE, SLICE, UNREADY_PODS),
        "WORKS",
        notes=frozenset({"EndpointSlicesOutOfDate"}),
    ),
    SetUp(
        "endpoints of an older selector",
        cluster(edit(SERVICE, "app: api", "app: apis"), SLICE, PODS),
        "WORKS",
        notes=frozenset({"EndpointSlicesOutOfDate"}),
    ),
    SetUp(
        "source ranges of a load balancer with only a host name",
        cluster(
            edit(BALANCER, "ip: 203.0.113.80", "hostname: lb.example.com").replace(
                "  selector:", "  loadBalancerSourceRanges: [198.51.100.0/24]\n  selector:"
            ),
            SLICE,
            PODS,
        ),
        "WORKS",
        client="203.0.113.7",
        notes=frozenset({"LoadBalancerBypassesNode", "SourceRangesWithoutLoadBalancer"}),
    ),
    SetUp(
        "hints for other zones",
        cluster(SERVICE, ZONE_HINTS, PODS),
        "WORKS",
        notes=frozenset({"HintsExcludeThisNode"}),
    ),
    SetUp(
        "hints, but the node has no zone",
        cluster(SERVICE, ZONE_HINTS, PODS).replace(", labels: {topology.kubernetes.io/zone: a}", ""),
        "WORKS",
        notes=frozenset({"HintsExcludeThisNode"}),
    ),
    SetUp(
        "policy Local for a client on a node with an endpoint",
        cluster(edit(SERVICE, "  selector:", "  internalTrafficPolicy: Local\n  selector:"), REMOTE_SLICE, PODS),
        "WORKS",
        client="10.244.2.77",
    ),
    SetUp(
        "one of two slices invalid",
        cluster(
            SERVICE, SLICE, edit(SLICE, "x7k2p", "zzzzz").replace("addresses: [10.244.1.5]", "addresses: none"), PODS
        ),
        "WORKS",
        notes=frozenset({"InvalidEndpoints"}),
    ),
    SetUp("hints, but the Node was not seen", "---".join((SERVICE, ZONE_HINTS, PODS)), "WORKS"),
    SetUp("ClusterIP", cluster(SERVICE, SLICE, PODS), "WORKS"),
    SetUp("NodePort", cluster(NODE_PORT, SLICE, PODS), "WORKS"),
    SetUp("load balancer", cluster(BALANCER, SLICE, PODS), "WORKS"),
    SetUp("dual-stack", cluster(DUAL_STACK, SLICE, SLICE_IPV6, PODS), "WORKS"),
    SetUp("without pods in the files", no_pods(SERVICE, SLICE), "WORKS"),
    SetUp("no selector, slice written by hand", no_pods(without(SERVICE, "  selector: {app: api}\n"), SLICE), "WORKS"),
    SetUp(
        "policy Local with an endpoint here",
        cluster(edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"), SLICE, PODS),
        "WORKS",
    ),
    SetUp(
        "policy Local for a client in the cluster",
        cluster(edit(NODE_PORT, "  selector:", "  externalTrafficPolicy: Local\n  selector:"), REMOTE_SLICE, PODS),
        "WORKS",
        client="10.244.1.77",
    ),
    SetUp(
        "unready endpoints that are published",
        cluster(
            edit(SERVICE, "  selector:", "  publishNotReadyAddresses: true\n  selector:"),
            SLICE,
            UNREADY_PODS,
        ),
        "WORKS",
    ),
    SetUp(
        "client in the source ranges",
        cluster(
            edit(BALANCER, "  selector:", "  loadBalancerSourceRanges: [203.0.113.0/24]\n  selector:"), SLICE, PODS
        ),
        "WORKS",
        client="203.0.113.7",
    ),
    SetUp("client outside, NodePort", cluster(NODE_PORT, SLICE, PODS), "WORKS", client="203.0.113.7"),
    SetUp(
        "hints for this zone",
        cluster(
            SERVICE,
            SLICE.replace("zone: a}", "zone: a, hints: {forZones: [{name: a}]}}").replace(
                "zone: b}", "zone: b, hints: {forZones: [{name: b}]}}"
            ),
            PODS,
        ),
        "WORKS",
    ),
    SetUp(
        "owner of a contested external IP",
        cluster(
            edit(SERVICE, "  selector:", "  externalIPs: [198.51.100.5]\n  selector:"),
            SLICE,
            PODS,
            edit(OTHER, "  ports:", "  externalIPs: [198.51.100.5]\n  ports:").replace("aaa", "zzz"),
        ),
        "WORKS",
        notes=frozenset({"OwnsContestedFrontend"}),
    ),
    SetUp(
        "one of two endpoints not ready",
        cluster(
            SERVICE,
            edit(SLICE, "[10.244.2.5], conditions: {ready: true", "[10.244.2.5], conditions: {ready: false"),
            PODS,
        ),
        "WORKS",
        notes=frozenset({"SomeEndpointsNotReady"}),
    ),
    SetUp(
        "network policies",
        cluster(SERVICE, SLICE, PODS, POLICY),
        "WORKS",
        notes=frozenset({"NetworkPolicyPresent"}),
    ),
    SetUp(
        "undeclared target port",
        cluster(edit(SERVICE, "targetPort: http", "targetPort: 8081"), SLICE, PODS),
        "WORKS",
        notes=frozenset({"TargetPortNotDeclared"}),
    ),
    SetUp(
        "load balancer with only a hostname",
        cluster(edit(BALANCER, "ip: 203.0.113.80", "hostname: lb.example.com"), SLICE, PODS),
        "WORKS",
        notes=frozenset({"LoadBalancerBypassesNode"}),
    ),
    SetUp(
        "other ports and names",
        cluster(
            edit(SERVICE, "targetPort: http", "targetPort: 8080"),
            SLICE,
            PODS,
            OTHER,
        ),
        "WORKS",
    ),
]
