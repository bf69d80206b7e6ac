"""`nodePortAddresses`: NodePorts use only these addresses. Host programs can use the same port on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab import objects, proxy
from tests.lab.client import Answered, Refused, TimedOut, send_request
from tests.lab.links import add_addresses
from tests.lab.modes import BOTH_MODES, mode_flag
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.web_service import DROP_TIMEOUT

NODE_PORT = 30080
NODE_PORT_ADDRESSES = "--nodeport-addresses=10.99.0.0/24,fd00:99::/64"
OTHER_ADDRESSES = ("192.0.2.5", "2001:db8:2::5")
FAMILIES = {4: "IPv4", 6: "IPv6"}

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


@pytest.fixture
def host_program(lab: Lab, servers: Servers) -> Host:
    """A host program on addresses without NodePorts."""
    add_addresses(
        lab.node.namespace, "lo", *(f"{address}/{128 if ':' in address else 32}" for address in OTHER_ADDRESSES)
    )
    found = Host("program", lab.node.namespace, OTHER_ADDRESSES)
    for protocol in ("TCP", "UDP"):
        servers.serve(found, NODE_PORT, protocol)
    return found


def node_port(protocol: str, **spec: Any) -> objects.Object:
    found = objects.service("web", "10.96.0.80", "fd00:10:96::80", protocol=protocol, type="NodePort", **spec)
    found["spec"]["ports"][0]["nodePort"] = NODE_PORT
    return found


@BOTH_MODES
@VERSIONS
def test_without_endpoints_only_node_port_addresses_reject(
    lab: Lab, host_program: Host, tmp_path: Path, mode: str, version: int
) -> None:
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    for protocol in ("TCP", "UDP"):
        objects.write(tmp_path / "web.yaml", [objects.node(), node_port(protocol)])
        proxy.apply(lab, tmp_path, mode_flag(mode), NODE_PORT_ADDRESSES)
        assert send_request(outsider, lab.node.address(version), NODE_PORT, protocol) == Refused()
        answer = send_request(outsider, host_program.address(version), NODE_PORT, protocol)
        assert answer == Answered("program", outsider.address(version))


@BOTH_MODES
@VERSIONS
def test_without_local_endpoints_only_node_port_addresses_drop(
    lab: Lab, host_program: Host, tmp_path: Path, mode: str, version: int
) -> None:
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    endpoints = {4: "10.244.2.9", 6: "fd00:10:244:2::9"}
    slices = [
        objects.endpoint_slice("web", [objects.endpoint(endpoints[number], "node-2")], family=family)
        for number, family in FAMILIES.items()
    ]
    objects.write(tmp_path / "web.yaml", [objects.node(), node_port("TCP", externalTrafficPolicy="Local"), *slices])
    proxy.apply(lab, tmp_path, mode_flag(mode), NODE_PORT_ADDRESSES)
    assert send_request(outsider, lab.node.address(version), NODE_PORT, timeout=DROP_TIMEOUT) == TimedOut()
    assert send_request(outsider, host_program.address(version), NODE_PORT) == Answered(
        "program", outsider.address(version)
    )
