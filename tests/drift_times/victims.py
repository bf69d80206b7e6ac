"""The Services whose rules are damaged, and the names of their rules in the kernel."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from kproxy.model.types import Family
from tests.lab import objects
from tests.lab.topology import NODE_ADDRESSES

PODS = {Family.IPV4: ("10.244.1.11", "10.244.1.12"), Family.IPV6: ("fd00:10:244:1::11", "fd00:10:244:1::12")}
"""The pods of all Services. A server answers on both addresses."""

OTHER_PODS = {Family.IPV4: "10.244.1.66", Family.IPV6: "fd00:10:244:1::66"}
NODE_IPS = dict(zip(Family, NODE_ADDRESSES, strict=True))
EXTERNAL_IPS = {Family.IPV4: "203.0.113.7", Family.IPV6: "2001:db8:7::7"}
LOAD_BALANCER_IPS = {Family.IPV4: "203.0.113.8", Family.IPV6: "2001:db8:7::8"}
SOURCE_RANGES = ("198.51.100.0/24", "2001:db8:51::/64")

FULL, NODE, EMPTY, PLAIN = 1, 2, 3, 4
"""The numbers of the Services with every feature, with a NodePort and without endpoints, and of the first plain one."""

NODE_PORT = 30080


def name(number: int) -> str:
    """Return the name of a Service."""
    return f"web-{number:05}"


def cluster_ip(number: int, family: Family) -> str:
    """Return the ClusterIP of a Service."""
    return (
        f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        if family is Family.IPV4
        else f"fd00:10:96::{number:x}"
    )


def number_of(service: str, turn: int, services: int) -> int:
    """Return the number of the Service that a damage affects. Plain Services take turns."""
    return {"full": FULL, "node": NODE}.get(service, PLAIN + turn % (services - PLAIN))


def write(path: Path, services: int) -> None:
    """Write the Node and the Services, numbered from 1 to `services`."""
    items = [objects.node(), *(each for number in range(1, services + 1) for each in service_objects(number))]
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))


def service_objects(number: int) -> Iterator[objects.Object]:
    """Yield a Service and its EndpointSlices."""
    spec: objects.Object = {"type": "ClusterIP"}
    if number in {FULL, NODE}:
        spec = {"type": "NodePort"}
    if number == FULL:
        spec = {"type": "LoadBalancer", "externalIPs": list(EXTERNAL_IPS.values()), "sessionAffinity": "ClientIP"}
        spec |= {"externalTrafficPolicy": "Local", "loadBalancerSourceRanges": list(SOURCE_RANGES)}
    if number == EMPTY:
        spec |= {"externalIPs": ["203.0.113.9", "2001:db8:7::9"]}
    found = objects.service(name(number), *(cluster_ip(number, family) for family in Family), **spec)
    if number in {FULL, NODE}:
        found["spec"]["ports"][0]["nodePort"] = NODE_PORT + number
    if number == FULL:
        found["status"] = {"loadBalancer": {"ingress": [{"ip": each} for each in LOAD_BALANCER_IPS.values()]}}
    yield found
    for family in Family if number != EMPTY else ():
        endpoints = [objects.endpoint(pod) for pod in PODS[family]]
        yield objects.endpoint_slice(name(number), endpoints, family=family.value)


def addresses(number: int, family: Family) -> dict[str, str]:
    """Return the names that do not depend on the rules."""
    pod1, pod2 = PODS[family]
    other = OTHER_PODS[family]
    return {
        "ip": cluster_ip(number, family),
        "port": str(NODE_PORT + number),
        "pod1": pod1,
        "pod2": pod2,
        "node_ip": NODE_IPS[family],
        "other_pod": other,
        "other_socket": f"[{other}]:9" if ":" in other else f"{other}:9",
        "no_endpoints_ip": cluster_ip(EMPTY, family),
        "load_balancer_ip": LOAD_BALANCER_IPS[family],
        "stray_ip": "10.111.0.1" if family is Family.IPV4 else "fd00:10:96::ffff",
        "family": "ip" if family is Family.IPV4 else "ip6",
    }


def nftables_names(number: int, listed: str) -> dict[str, str]:
    """Return the names of the chains of the Service in the output of `nft list table`."""

    def chain(prefix: str) -> str:
        found = re.search(rf"chain ({prefix}-\S+-demo/{name(number)}/\S+) {{", listed)
        return found[1] if found else ""

    return {
        "svc": chain("service"),
        "local": chain("local"),
        "external": chain("external"),
        "firewall": chain("firewall"),
        "endpoint": chain("endpoint"),
    }


def iptables_names(number: int, saved: str) -> dict[str, str]:
    """Return the names of the chains and the rules of the Service in the output of `iptables-save`."""
    lines = saved.splitlines()

    def rule(*words: str) -> str:
        return next((line for line in lines if line.startswith("-A ") and all(word in line for word in words)), "")

    def target(line: str) -> str:
        return line.rpartition(" -j ")[2]

    def chain_of(line: str) -> str:
        return line.split()[1] if line else ""

    own = f'"demo/{name(number)}:main'
    dispatch, other = (
        rule(f"{own} cluster IP", "-j KUBE-SVC-"),
        rule(f"demo/{name(NODE)}:main cluster IP", "-j KUBE-SVC-"),
    )
    rejected = (
        rule(f'"demo/{name(EMPTY)}:main has no endpoints', f"-d {_EMPTY_IPS[4 if '.' in dispatch.split()[3] else 6]}/")
        if dispatch
        else ""
    )
    svc = target(dispatch)
    endpoints = [target(line) for line in lines if line.startswith(f"-A {svc} ") and "-j KUBE-SEP-" in line]
    ext = target(rule(f"{own} external IP", "-j KUBE-EXT-"))
    node_port = rule(own, "-j KUBE-EXT-", "-A KUBE-NODEPORTS", f"--dport {NODE_PORT + number} ")
    return {
        "svc": svc,
        "dispatch": chain_of(dispatch),
        "rule": dispatch.removeprefix("-A"),
        "sep1": endpoints[0],
        "sep2": endpoints[1],
        "ext": ext,
        "svl": next((target(line) for line in lines if line.startswith(f"-A {ext} -j KUBE-SVL-")), "") if ext else "",
        "fw": target(rule(f"{own} loadbalancer IP", "-j KUBE-FW-")),
        "other_svc": target(other),
        "node_port_rule": node_port.removeprefix("-A"),
        "reject_rule": rejected.removeprefix("-A"),
        "reject_dispatch": chain_of(rejected),
        "no_endpoints": _EMPTY_IPS[4 if "." in dispatch.split()[3] else 6],
    }


_EMPTY_IPS = {4: cluster_ip(EMPTY, Family.IPV4), 6: cluster_ip(EMPTY, Family.IPV6)}
