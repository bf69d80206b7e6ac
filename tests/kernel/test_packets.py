"""The packet table through the kernel in both modes, with `kproxy apply` on a node and sockets at both ends.

A server listens on every destination of a row: a pod on an endpoint, a node on its own addresses, and a host behind
the uplink on all others. So the answer shows where the packet was sent, and only a rule can reject or drop it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

import pytest

from tests.lab.client import Answered, Failed, Outcome, Refused, TimedOut, send_request
from tests.lab.proxy import KPROXY
from tests.lab.requirements import missing_protocol
from tests.lab.servers import Servers
from tests.lab.topology import OUTSIDE_ADDRESSES, Host, Lab
from tests.packets.differences import Reason, read_differences, read_kproxy_table
from tests.packets.senders import LOCAL_POD_CIDRS, NODE, NODE_ADDRESSES, NODE_AS, SERVICE_CIDRS, sender_of, source_of
from tests.packets.table import Row, read_table, socket_text, split_socket
from tests.recordings import GOLDEN

LOOPBACK = ("127.0.0.1", "::1")
TRIES = 4
CONCURRENCY = 32
SILENCE = 0.5
"""Seconds without an answer that count as dropped; answers take a hundredth of it."""
PATIENCE = 10.0
NOT_SENT = Failed(f"[Errno {errno.EPERM}] {os.strerror(errno.EPERM)}")
"""The error of a UDP sender when a rule in the OUTPUT chain drops or rejects its datagram."""

SERVICE_CIDR = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "ServiceCIDR",
    "metadata": {"name": "kubernetes"},
    "spec": {"cidrs": list(SERVICE_CIDRS)},
}
"""The ServiceCIDR of all recorded clusters. Only nftables mode uses it."""

Answers = dict[Row, list[Outcome]]


def can_be_sent(row: Row) -> bool:
    """Return whether the lab can send the packet of a row.

    It cannot preset affinity clients or assign a VIP to the node. Kernels never send loopback addresses to neighbors.
    """
    to_neighbor = ip_address(row.address).is_loopback and row.sender != NODE
    return not (row.remembering or to_neighbor or row.sender.startswith(NODE_AS))


ROWS = {
    "iptables": [row for row in read_table() if can_be_sent(row)],
    "nftables": [row for row in read_kproxy_table() if can_be_sent(row)],
}
CASES = [(mode, row) for mode, rows in ROWS.items() for row in rows]
TO_ITSELF = {row for reason, row in read_differences() if reason is Reason.HAIRPIN}
"""Rows of remote endpoints that send to themselves. Their kernel drops the packet, which has its own source address."""


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, kernel: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Answers]:
    """The answers to all rows of a scenario in one mode, all sent in one lab."""
    mode, scenario = request.param
    folder = GOLDEN / scenario
    objects = shutil.copytree(folder, tmp_path_factory.mktemp("packets") / scenario)
    (objects / "servicecidrs.json").write_text(json.dumps(SERVICE_CIDR))
    rows = [row for row in ROWS[mode] if row.scenario == scenario and not missing_protocol(row.protocol)]
    with Lab() as lab, Servers() as servers:
        packet_lab = PacketLab(lab, servers, rows)
        apply = [KPROXY, "apply", f"--config={folder}/config.json", f"--objects={objects}", f"--proxy-mode={mode}"]
        lab.node.namespace.run(apply)
        # All rows of a source share its affinity. Sent at once, they would race to set it.
        sequential = [row for row in rows if "affinity" in row.fate]
        concurrent = [row for row in rows if row not in sequential]
        found = {row: packet_lab.send(row) for row in sequential}
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            found |= zip(concurrent, pool.map(packet_lab.send, concurrent), strict=True)
        yield found


@pytest.mark.parametrize(
    ("answers", "case"),
    # The mode is part of both parameters: pytest groups tests by shared parameters.
    [((mode, row.scenario), (mode, row)) for mode, row in CASES],
    ids=[f"{mode} {row}" for mode, row in CASES],
    indirect=["answers"],
    scope="module",
)
def test_kernel_handles_the_packet_as_in_the_table(answers: Answers, case: tuple[str, Row]) -> None:
    _, row = case
    missing = missing_protocol(row.protocol)
    if missing:
        pytest.skip(missing)
    assert set(answers[row]) <= expected(row)
    if "affinity" in row.fate:
        assert len(set(answers[row])) == 1


def expected(row: Row) -> set[Outcome]:
    """Return all answers that the row allows."""
    own, node = source_of(row), NODE_ADDRESSES[ip_address(row.address).version]
    allowed: set[Outcome] = set()
    for part in row.fate.split("; "):
        manner, _, endpoints = part.partition(" ")
        if manner == "drop":
            allowed.add(TimedOut())
        elif manner == "reject":
            allowed.add(Refused())
        elif manner == "untouched":
            allowed.add(Answered(socket_text(row.address, row.port), own))
        else:
            assert manner.startswith("dnat"), row.fate
            allowed |= {Answered(each, node if "+masq" in manner else own) for each in endpoints.split(", ")}
    if row in TO_ITSELF:
        allowed.add(TimedOut())
    if row.sender == NODE and row.protocol == "UDP" and allowed & {TimedOut(), Refused()}:
        allowed.add(NOT_SENT)
    return allowed


class PacketLab:
    """The hosts of a scenario's rows in a lab: senders, endpoints, and owners of all other addresses.

    Hosts that only answer are merged into one: every socket answers with its own address, not with its host's.
    """

    def __init__(self, lab: Lab, servers: Servers, rows: list[Row]) -> None:
        self._lab = lab
        self._hosts: dict[str, Host] = dict.fromkeys((*lab.node.addresses, *LOOPBACK), lab.node)
        self._hosts |= dict.fromkeys(OUTSIDE_ADDRESSES, lab.outside)
        senders = {row.sender for row in rows} | {"other node"}
        self._senders = {sender: self._add_sender(sender) for sender in sorted(senders)}
        sockets = {(*split_socket(each), row.protocol) for row in rows for each in endpoints_of(row)}
        sockets |= {(row.address, row.port, row.protocol) for row in rows if not row.fate.startswith("dnat")}
        self._add_servers_hosts(sorted({address for address, _, _ in sockets} - self._hosts.keys()))
        for address, port, protocol in sorted(sockets):
            host = Host(socket_text(address, port), self._hosts[address].namespace, (address,))
            servers.serve(host, port, protocol)

    def send(self, row: Row) -> list[Outcome]:
        """Send requests and return their outcomes: several with random endpoints, until one times out."""
        tries = TRIES if row.fate.startswith("dnat") else 1
        patience = SILENCE if row.fate == "drop" or row in TO_ITSELF else PATIENCE
        outcomes: list[Outcome] = []
        while len(outcomes) < tries and TimedOut() not in outcomes:
            outcomes.append(
                send_request(self._senders[row.sender], row.address, row.port, row.protocol, timeout=patience)
            )
        return outcomes

    def _add_sender(self, sender: str) -> Host:
        """Add a host. The name of a pod is that of its link, which must match the names of pod interfaces."""
        if sender == NODE:
            return self._lab.node
        place = sender_of(sender)
        name = {"eth0": f"out-{len(self._hosts)}", "veth-endpoint": f"veth-{len(self._hosts)}"}
        host = self._lab.add_client(name.get(place.interface, place.interface), *place.addresses.values())
        return self._own(host)

    def _add_servers_hosts(self, addresses: list[str]) -> None:
        here = [address for address in addresses if any(ip_address(address) in cidr for cidr in LOCAL_POD_CIDRS)]
        elsewhere = [address for address in addresses if address not in here]
        if here:
            self._own(self._lab.add_pod("veth-others", *here))
        if elsewhere:
            self._own(self._lab.add_pod("elsewhere", *elsewhere, node="elsewhere"))

    def _own(self, host: Host) -> Host:
        self._hosts |= dict.fromkeys(host.addresses, host)
        return host


def endpoints_of(row: Row) -> list[str]:
    """Return the endpoints of a row."""
    return [each for part in re.findall(r"dnat\S* ([^;]+)", row.fate) for each in part.split(", ")]
