"""Services with the longest names that Kubernetes allows: their comments fit into rules of both modes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects, proxy
from tests.lab.client import Answered, send_request
from tests.lab.modes import BOTH_MODES, mode_flag
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.servers import Servers
from tests.lab.topology import Lab

NAMESPACE = "n" * 63
NAME = "1" + "s" * 62
"""Since Kubernetes 1.37, the name of a Service may begin with a digit (RelaxedServiceNameValidation)."""
PORTS = ("p" * 15, "p" * 14 + "q")
NODE_PORTS = (30080, 30081)
MAX_COMMENT = {"iptables": 255, "nftables": 128}
"""XT_MAX_COMMENT_LEN without the terminating NUL, and NFTNL_UDATA_COMMENT_MAXLEN."""
CLUSTER_IPS = {4: "10.96.0.80", 6: "fd00:10:96::80"}
VIPS = {4: "203.0.113.8", 6: "2001:db8:7::8"}
FAMILIES = {4: "IPv4", 6: "IPv6"}


@pytest.fixture
def folder(lab: Lab, servers: Servers, tmp_path: Path) -> Path:
    """A folder with a Service that uses every kind of rule, and its endpoint."""
    pod = lab.add_pod("pod", "10.244.1.1", "fd00:10:244:1::1")
    servers.serve(pod, 8080, "TCP")
    affinity: Any = {"clientIP": {"timeoutSeconds": 60}}
    found = objects.service(
        NAME,
        *CLUSTER_IPS.values(),
        namespace=NAMESPACE,
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        externalIPs=["203.0.113.7", "2001:db8:7::7"],
        healthCheckNodePort=31000,
        loadBalancerSourceRanges=["198.51.100.0/24", "2001:db8:51::/64"],
        sessionAffinity="ClientIP",
        sessionAffinityConfig=affinity,
    )
    found["spec"]["ports"] = [
        {"name": name, "protocol": "TCP", "port": 80 + number, "targetPort": 8080, "nodePort": NODE_PORTS[number]}
        for number, name in enumerate(PORTS)
    ]
    found["status"] = {"loadBalancer": {"ingress": [{"ip": address} for address in VIPS.values()]}}
    slices = []
    for version, family in FAMILIES.items():
        made = objects.endpoint_slice(
            NAME, [objects.endpoint(pod.address(version))], family=family, namespace=NAMESPACE
        )
        made["ports"] = [{"name": name, "protocol": "TCP", "port": 8080} for name in PORTS]
        slices.append(made)
    # A second Service without endpoints, for the rules that reject.
    empty = objects.service("2" + NAME[1:], "10.96.0.81", "fd00:10:96::81", namespace=NAMESPACE, type="NodePort")
    empty["spec"]["ports"][0] |= {"name": PORTS[0], "nodePort": 30082}
    objects.write(tmp_path / "services.yaml", [objects.node(), found, empty, *slices])
    return tmp_path


@BOTH_MODES
def test_longest_names_fit_into_comments_and_serve(
    lab: Lab, folder: Path, namespaces: Callable[[], Namespace], mode: str
) -> None:
    client = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    proxy.apply(lab, folder, mode_flag(mode))
    for version in FAMILIES:
        for address, port in ((VIPS[version], 80), (VIPS[version], 81), (lab.node.address(version), NODE_PORTS[1])):
            assert send_request(client, address, port) == Answered("pod", client.address(version))
        assert isinstance(send_request(lab.node, CLUSTER_IPS[version], 81), Answered)
    comments = comments_of(lab.node.namespace, mode)
    assert max(map(len, comments)) <= MAX_COMMENT[mode]
    assert any(f"{NAMESPACE}/{NAME}"[:100] in comment for comment in comments)
    flags = [f"--objects={folder}", *proxy.FLAGS, mode_flag(mode)]
    assert "no difference" in " ".join(lab.node.namespace.run([KPROXY, "diff", *flags]).stdout.split())
    if mode == "nftables":  # kproxy has written them over netlink; iptables-restore has accepted those of iptables mode
        rendered = lab.node.namespace.run([KPROXY, "render", *flags]).stdout
        namespaces().run(["nft", "-f", "-"], rendered)


def comments_of(node: Namespace, mode: str) -> list[str]:
    """Return the comments of all rules, chains and elements, as the programs print them."""
    if mode == "nftables":
        listed = "".join(node.run(["nft", "list", "table", family, "kube-proxy"]).stdout for family in ("ip", "ip6"))
    else:
        listed = "".join(node.run([f"{program}-save"]).stdout for program in ("iptables", "ip6tables"))
    return re.findall(r'comment "([^"]+)"', listed)
