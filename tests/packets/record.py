"""Generate the tables of packets from the recordings: `python -m tests.packets.record`.

The packets follow from the recorded objects, read as plain JSON. Their fates follow from the recorded rules of each
mode. The only code of kproxy involved is the simulators.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from kproxy.model.types import Family, Protocol
from kproxy.simulate.iptables import IptablesSimulator
from kproxy.simulate.nftables import NftablesSimulator
from tests.packets.differences import PATH as DIFFERENCES
from tests.packets.differences import Difference, differences_text, reason_for
from tests.packets.expectation import describe
from tests.packets.senders import (
    NODE,
    NODE_ADDRESSES,
    NODE_AS,
    OTHER_NODE_ADDRESSES,
    SECOND_NODE_ADDRESSES,
    UNALLOCATED,
    UNDEFINED_PORT,
    packet_of,
)
from tests.packets.table import PATH, Row, socket_text, table_text
from tests.recordings import GOLDEN, SCENARIOS, items

IPTABLES_DUMPS = {Family.IPV4: "iptables-save.txt", Family.IPV6: "ip6tables-save.txt"}
NFTABLES_DUMPS = {Family.IPV4: "nft-ip.txt", Family.IPV6: "nft-ip6.txt"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def recorded_iptables(scenario: str) -> dict[Family, IptablesSimulator]:
    """Return the rules that kube-proxy programmed in iptables mode."""
    folder = GOLDEN / scenario
    return {family: IptablesSimulator((folder / name).read_text(), family) for family, name in IPTABLES_DUMPS.items()}


def recorded_nftables(scenario: str) -> dict[Family, NftablesSimulator]:
    """Return the rules that kube-proxy programmed in nftables mode."""
    folder = GOLDEN / scenario
    return {family: NftablesSimulator((folder / name).read_text(), family) for family, name in NFTABLES_DUMPS.items()}


def record() -> list[Row]:
    """Return all rows of all scenarios, with their fates in iptables mode."""
    rows = []
    for scenario in SCENARIOS:
        rules = recorded_iptables(scenario)
        packets = dict.fromkeys(_packets(scenario))
        rows += [row._replace(fate=describe(rules[row.family].send(packet_of(row)))) for row in packets]
    return rows


def record_differences(rows: list[Row]) -> list[Difference]:
    """Return the rows whose fate differs in nftables mode. Raises `ValueError` for a row without a reason."""
    rules = {scenario: recorded_nftables(scenario) for scenario in SCENARIOS}
    differences = []
    for row in rows:
        fate = describe(rules[row.scenario][row.family].send(packet_of(row)))
        if fate != row.fate:
            differences.append(Difference(reason_for(row, fate), row._replace(fate=fate)))
    return differences


class _Service:
    """A recorded Service in one IP family, with its endpoints."""

    def __init__(self, scenario: str, item: dict[str, Any], version: int) -> None:
        self.scenario = scenario
        self.spec = item["spec"]
        self.version = version
        self.ports = self.spec["ports"]
        name = item["metadata"]["name"]
        self.slices = [
            item
            for item in items(scenario, "endpointslices")
            if item["metadata"]["labels"].get("kubernetes.io/service-name") == name
            and item["addressType"] == f"IPv{version}"
        ]
        status = item.get("status", {}).get("loadBalancer", {}).get("ingress", [])
        self.vips = self._of_version([each["ip"] for each in status])
        self.external_ips = self._of_version(self.spec.get("externalIPs", []))
        self.cluster_ips = self._of_version([ip for ip in self.spec.get("clusterIPs", []) if ip != "None"])

    def _of_version(self, addresses: list[str]) -> list[str]:
        return [address for address in addresses if ip_address(address).version == self.version]

    def local_address(self) -> list[str]:
        """Return the first endpoint on this node, ready or not."""
        return self._addresses(local=True)[:1]

    def far_addresses(self) -> list[str]:
        """Return the endpoints on other nodes, ready or not."""
        return self._addresses(local=False)

    def _addresses(self, *, local: bool) -> list[str]:
        endpoints = [each for one in self.slices for each in one["endpoints"] or []]
        return [each["addresses"][0] for each in endpoints if (each.get("nodeName") == "node-1") is local]

    def sockets(self) -> list[str]:
        """Return the endpoints of the first slice with its first port, ready or not."""
        return [
            socket_text(each["addresses"][0], one["ports"][0]["port"])
            for one in self.slices[:1]
            if one["ports"]
            for each in one["endpoints"] or []
        ]


def _packets(scenario: str) -> Iterator[Row]:
    """Yield the packets of a scenario. The large random scenarios get fewer packets per Service."""
    brief = scenario.startswith("random-")
    pods = ("pod", "bridged pod") if scenario == "config-detect-bridge" else ("pod",)
    inside = pods if brief else (*pods, "far pod")
    outside = ("client",) if brief else ("other node", "client")
    for item in items(scenario, "services"):
        if item["metadata"]["name"] == "kubernetes":
            yield from (Row(scenario, sender, "10.96.0.1", 443, "TCP") for sender in ("pod", "client") if not brief)
            continue
        for version in (4, 6):
            service = _Service(scenario, item, version)
            own = tuple(f"endpoint {address}" for address in service.local_address())
            senders = (*inside, *own, NODE, *outside)
            ports = service.ports[:1] if brief else service.ports
            for port in ports:
                yield from _frontends(service, port, senders)
                yield from _affinity(service, port)
            if not brief:
                yield from _near_misses(service)
    if not brief:
        yield from _unallocated(scenario)


def _unallocated(scenario: str) -> Iterator[Row]:
    """Yield packets to an unallocated ClusterIP, in the IP families of the scenario's Services."""
    families = {family for item in items(scenario, "services") for family in item["spec"].get("ipFamilies", ())}
    for version, address in UNALLOCATED.items():
        if f"IPv{version}" in families:
            yield from (Row(scenario, sender, address, 80, "TCP") for sender in ("pod", NODE, "client"))


def _frontends(service: _Service, port: dict[str, Any], senders: tuple[str, ...]) -> Iterator[Row]:
    def to(address: str, number: int, *from_senders: str) -> Iterator[Row]:
        for sender in from_senders:
            yield Row(service.scenario, sender, address, number, port["protocol"])

    for address in service.cluster_ips:
        yield from to(address, port["port"], *senders)
    for address in service.external_ips:
        yield from to(address, port["port"], *senders)
    for address in service.vips:
        yield from to(address, port["port"], *senders, "second client", "stranger", f"{NODE_AS}{address}")
    number = port.get("nodePort")
    if number and service.cluster_ips:
        yield from to(NODE_ADDRESSES[service.version], number, *senders)
        yield from to(LOOPBACK[service.version], number, NODE)


def _affinity(service: _Service, port: dict[str, Any]) -> Iterator[Row]:
    """Yield packets of senders with session affinity to an endpoint: each of the current ones, and a removed one."""
    if service.spec.get("sessionAffinity") != "ClientIP" or not service.cluster_ips:
        return
    removed = {4: "10.244.3.250:8080", 6: "[fd00:10:244:3::250]:8080"}[service.version]
    for socket in (*service.sockets(), removed):
        address = service.cluster_ips[0]
        yield Row(service.scenario, "pod", address, port["port"], port["protocol"], socket)
    if port.get("nodePort"):
        for socket in service.sockets():
            node = NODE_ADDRESSES[service.version]
            yield Row(service.scenario, "client", node, port["nodePort"], port["protocol"], socket)


def _near_misses(service: _Service) -> Iterator[Row]:
    """Yield packets from endpoints on other nodes, and packets that almost match a frontend."""
    scenario, first = service.scenario, service.ports[0]
    known = {(port["port"], port["protocol"]) for port in service.ports}
    for address in service.cluster_ips:
        for far in service.far_addresses():
            yield Row(scenario, f"endpoint {far}", address, first["port"], first["protocol"])
        for sender in ("pod", NODE, "client"):
            yield Row(scenario, sender, address, UNDEFINED_PORT, "TCP")
        other: Protocol = "UDP" if first["protocol"] == "TCP" else "TCP"
        if (first["port"], other) not in known:
            yield Row(scenario, "pod", address, first["port"], other)
    for address in (*service.external_ips, *service.vips):
        yield Row(scenario, "pod", address, UNDEFINED_PORT, "TCP")
    for socket, address in zip(service.sockets(), service.local_address(), strict=False):
        yield Row(scenario, "client", address, int(socket.rpartition(":")[2]), first["protocol"])
    if first.get("nodePort"):
        yield from _near_misses_of_node_port(service, first["nodePort"], first["protocol"])


def _near_misses_of_node_port(service: _Service, number: int, protocol: Protocol) -> Iterator[Row]:
    node = NODE_ADDRESSES[service.version]
    if not service.cluster_ips:
        yield Row(service.scenario, "client", node, number, protocol)
        return
    second = SECOND_NODE_ADDRESSES[service.version]
    yield Row(service.scenario, NODE_AS + second, second, number, protocol)
    for port in (number, UNDEFINED_PORT):
        yield Row(service.scenario, "other node", LOOPBACK[service.version], port, protocol)
    for sender in ("pod", NODE):
        yield Row(service.scenario, sender, OTHER_NODE_ADDRESSES[service.version], number, protocol)
    health = service.spec.get("healthCheckNodePort")
    if health:
        yield Row(service.scenario, "client", node, health, "TCP")


if __name__ == "__main__":
    recorded = record()
    PATH.write_text(table_text(recorded))
    DIFFERENCES.write_text(differences_text(record_differences(recorded)))
