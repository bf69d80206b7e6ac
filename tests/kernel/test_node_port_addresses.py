"""`nodePortAddresses`: NodePorts use only these addresses. Host programs can use the same port on others.

The value is any mix of CIDRs and keywords.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import objects, proxy
from tests.lab.client import Answered, Refused, TimedOut, send_request
from tests.lab.links import add_addresses
from tests.lab.modes import BOTH_MODES, mode_flag, rules_of
from tests.lab.servers import Servers
from tests.lab.topology import Host, Lab
from tests.lab.waiting import wait_until
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


@pytest.fixture
def web(lab: Lab, servers: Servers, tmp_path: Path) -> Path:
    """A folder with a NodePort Service and its endpoint. The node has more addresses than its primary ones."""
    add_addresses(
        lab.node.namespace, "lo", *(f"{address}/{128 if ':' in address else 32}" for address in OTHER_ADDRESSES)
    )
    pod = lab.add_pod("pod-1", "10.244.1.1", "fd00:10:244:1::1")
    servers.serve(pod, 8080, "TCP")
    slices = [
        objects.endpoint_slice("web", [objects.endpoint(pod.address(version))], family=family)
        for version, family in FAMILIES.items()
    ]
    objects.write(tmp_path / "web.yaml", [objects.node(), node_port("TCP"), *slices])
    return tmp_path


def reachable(lab: Lab, client: Host, version: int) -> set[str]:
    """Return the kinds of the node's addresses at which the NodePort answers; it refuses connections at the others."""
    addresses = {
        "primary": (client, lab.node.address(version)),
        "other": (client, OTHER_ADDRESSES[version == 6]),
        "localhost": (lab.node, "::1" if version == 6 else "127.0.0.1"),
    }
    outcomes = {kind: send_request(origin, address, NODE_PORT) for kind, (origin, address) in addresses.items()}
    answered = {kind for kind, outcome in outcomes.items() if isinstance(outcome, Answered)}
    assert all(outcome == Refused() for kind, outcome in outcomes.items() if kind not in answered), outcomes
    return answered


def answers_at_other(lab: Lab, client: Host, version: int) -> bool:
    """Return whether the NodePort answers at the address that is not the primary one."""
    return "other" in reachable(lab, client, version)


SETTINGS = {
    "": "primary other localhost",
    "all": "primary other localhost",
    "primary": "primary",
    "localhost": "localhost",
    "primary,localhost": "primary localhost",
    "localhost,192.0.2.0/24,2001:db8:2::/64": "other localhost",
    "primary,192.0.2.0/24,2001:db8:2::/64": "primary other",
    "primary,localhost,all": "primary other localhost",
}
"""For each value of the flag, where NodePorts answer if loopback addresses can have NodePorts."""


@BOTH_MODES
def test_keywords_and_cidrs_select_addresses(lab: Lab, web: Path, mode: str) -> None:
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    for setting, kinds in SETTINGS.items():
        proxy.apply(lab, web, mode_flag(mode), *([f"--nodeport-addresses={setting}"] if setting else []))
        for version in FAMILIES:
            expected = set((kinds if setting or mode == "iptables" else "primary").split())
            if mode == "nftables" or version == 6:
                expected.discard("localhost")
            assert reachable(lab, outsider, version) == expected, (setting, version)


@BOTH_MODES
def test_entries_of_one_family_do_not_restrict_the_other(lab: Lab, web: Path, mode: str) -> None:
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    proxy.apply(lab, web, mode_flag(mode), "--nodeport-addresses=2001:db8:2::/64")
    assert reachable(lab, outsider, 6) == {"other"}
    localhost = {"localhost"} if mode == "iptables" else set()
    assert reachable(lab, outsider, 4) == {"primary", "other"} | localhost


@BOTH_MODES
@VERSIONS
def test_ranges_beside_keywords_follow_the_addresses_of_interfaces(
    lab: Lab, web: Path, mode: str, version: int
) -> None:
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    namespace, other = lab.node.namespace, OTHER_ADDRESSES[version == 6]
    prefixed = f"{other}/{128 if version == 6 else 32}"
    setting = "--nodeport-addresses=primary,localhost,192.0.2.0/24,2001:db8:2::/64"
    with proxy.Daemon(lab, web, web / "kproxy.log", mode_flag(mode), setting) as daemon:
        daemon.wait_until_synced()
        assert {"primary", "other"} <= reachable(lab, outsider, version)
        namespace.run(["ip", "address", "del", prefixed, "dev", "lo"])
        wait_until(lambda: other not in rules_of(mode, namespace).text(), f"the rules no longer contain {other}")
        add_addresses(namespace, "lo", prefixed)
        wait_until(lambda: "other" in reachable(lab, outsider, version), f"NodePorts answer at {other}")
        assert "primary" in reachable(lab, outsider, version)


@BOTH_MODES
def test_primary_addresses_follow_the_node_and_outlive_it(lab: Lab, web: Path, mode: str) -> None:
    outsider = lab.add_client("outsider", "198.51.100.10", "2001:db8:51::10")
    _, *others = yaml.safe_load_all((web / "web.yaml").read_text())
    with proxy.Daemon(
        lab, web, web / "kproxy.log", mode_flag(mode), "--nodeport-addresses=primary,localhost"
    ) as daemon:
        daemon.wait_until_synced()
        assert all("primary" in reachable(lab, outsider, version) for version in FAMILIES)
        objects.write(web / "web.yaml", [objects.node(addresses=OTHER_ADDRESSES), *others])
        for version in FAMILIES:
            wait_until(partial(answers_at_other, lab, outsider, version), "NodePorts answer at the new primary address")
            assert "primary" not in reachable(lab, outsider, version)
        marker = "10.96.0.99"
        objects.write(web / "web.yaml", [*others, objects.service("marker", marker)])
        wait_until(lambda: marker in rules_of(mode, lab.node.namespace).text(), "the change without the Node is synced")
        assert all("other" in reachable(lab, outsider, version) for version in FAMILIES)
        assert daemon.is_up()
