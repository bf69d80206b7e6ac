"""`kproxy trace --live` on recorded clusters: the kernel treats real packets as the trace and the table predict.

The lab has no endpoints: a packet is traced until it leaves the node or is delivered to it.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

from kproxy.diagnose.trace.ask import KernelTrace, TracedPacket, trace_kernel
from kproxy.diagnose.trace.kernel import KernelError
from kproxy.diagnose.trace.trace import PacketTrace
from kproxy.host.nf_tables_trace import TraceTable
from kproxy.model.types import Family
from tests.kernel.test_packets import ROWS
from tests.lab.iptables import PREFIXES, PROGRAMS, add_counters, link_programs
from tests.lab.links import version_of
from tests.lab.modes import BOTH_MODES
from tests.lab.namespace import Namespace
from tests.lab.servers import FAMILIES, SOCKET_TYPES
from tests.lab.topology import Host, Lab
from tests.lab.waiting import wait_until
from tests.packets.programmed import iptables_text, nftables_text
from tests.packets.senders import NODE, sender_of, source_of
from tests.packets.table import Row
from tests.recordings import SCENARIOS

MODES = tuple(ROWS)


def chosen(mode: str, scenario: str) -> list[Row]:
    """Return two rows of a scenario: one sent by the node, if there is one, and one sent by another host."""
    rows = [row for row in ROWS[mode] if row.scenario == scenario and row.protocol != "SCTP"]
    number = SCENARIOS.index(scenario)
    groups = ([row for row in rows if row.sender == NODE], [row for row in rows if row.sender != NODE])
    return [group[number % len(group)] for group in groups if group]


CASES = {(mode, scenario): chosen(mode, scenario) for mode in MODES for scenario in SCENARIOS}


def program(node: Namespace, mode: str, scenario: str) -> None:
    """Load the rules that kproxy programs for a recorded cluster."""
    if mode == "nftables":
        node.run(["nft", "-f", "-"], "".join(nftables_text(scenario).values()))
        return
    add_counters(node)
    node.sysctl(ipv4__conf__all__route_localnet=1)
    for family, text in iptables_text(scenario).items():
        node.run([f"{PREFIXES[family]}-nft-restore"], text)


def add_sender(lab: Lab, row: Row) -> Host:
    """Add the sender of a row. The name of its link must match the names of pod interfaces."""
    place = sender_of(row.sender)
    name = {"eth0": "out", "veth-endpoint": "veth-1"}.get(place.interface, place.interface)
    return lab.add_client(name, *place.addresses.values())


def send(sender: Host, row: Row) -> None:
    """Send the first packet of a connection."""
    kind, number = SOCKET_TYPES[row.protocol]
    with sender.namespace.socket(FAMILIES[version_of(row.address)], kind, number) as sending:
        sending.setblocking(False)
        sending.connect_ex((row.address, row.port))
        if kind == socket.SOCK_DGRAM:
            sending.send(b"\n")


def trace_live(node: Namespace, row: Row, sender: Host | None) -> PacketTrace:
    """Trace the packet of a row in this process, and have it sent: by the trace itself if it comes from the node."""
    packet = TracedPacket(source=source_of(row), destination=row.address, port=row.port, protocol=row.protocol)

    def trace() -> PacketTrace:
        kernel = KernelTrace(packet, None)
        assert kernel.node_sends == (sender is None)
        return kernel.watch(lambda: send(sender, row) if sender else None)

    return node.call(trace)


def is_possible(found: PacketTrace, row: Row) -> bool:
    """Return whether what has happened to the real packet is one of the fates of its row."""
    assert found.live is not None
    live = found.live
    if row.fate.startswith(("drop", "reject")):
        return live.verdict == "dropped"
    if live.verdict != "accepted":
        return False
    untouched = f"[{row.address}]:{row.port}" if ":" in row.address else f"{row.address}:{row.port}"
    for part in row.fate.split("; "):
        manner, _, endpoints = part.partition(" ")
        reached = live.endpoint in (endpoints.split(", ") if endpoints else [untouched])
        if reached and live.masqueraded in (None, "+masq" in manner):
            return True
    return False


@pytest.mark.parametrize(("mode", "scenario"), CASES)
def test_kernel_treats_the_packet_as_predicted(lab: Lab, nft: None, mode: str, scenario: str) -> None:
    node = lab.node.namespace
    program(node, mode, scenario)
    for row in CASES[mode, scenario]:
        sender = None if row.sender == NODE else add_sender(lab, row)
        found = trace_live(node, row, sender)
        assert found.live is not None
        assert found.live.seen, row
        assert found.live.agrees, (str(row), found)
        assert (found.unknowns, found.unknown_probability) == ((), 0), row
        assert is_possible(found, row), (str(row), row.fate, found.live)


def test_packets_are_of_all_kinds() -> None:
    rows = [(mode, row) for (mode, _), rows in CASES.items() for row in rows]
    assert len(CASES) == 2 * len(SCENARIOS)
    for mode in MODES:
        sent = [row for own, row in rows if own == mode]
        manners = {row.fate.partition(" ")[0].removesuffix("+affinity") for row in sent}
        assert manners == {"dnat", "dnat+masq", "reject", "drop", "untouched"}
        assert {row.family for row in sent} == set(Family)
        assert {row.protocol for row in sent} == {"TCP", "UDP"}
        assert any(ip_address(row.address).is_loopback for row in sent)


@pytest.mark.parametrize("owned", [False, True], ids=["left over", "another trace"])
def test_table_that_exists_already_is_reported(node: Namespace, nft: None, owned: bool) -> None:
    packet = TracedPacket(source="10.99.0.2", destination="10.96.1.1", port=80, protocol="TCP")
    kernel = node.call(lambda: KernelTrace(packet, None))
    if owned:
        other = node.call(lambda: TraceTable(Family.IPV4, "output", ()))
    else:
        node.run(["nft", "add table ip kproxy-trace"])
    with pytest.raises(KernelError, match="ip kproxy-trace exists already"):
        node.call(kernel.watch)
    if owned:
        other.close()
        wait_until(lambda: "kproxy-trace" not in node.run(["nft", "list", "tables"]).stdout, "the end of the table")


# Without the program nft


@pytest.fixture
def path_without_nft(tmp_path: Path) -> str:
    """A PATH that has the programs of iptables, but not nft."""
    link_programs({name: name for name in PROGRAMS}, tmp_path)
    return str(tmp_path)


def run_trace(node: Namespace, path: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return node.run(["env", f"PATH={path}", sys.executable, "-m", "kproxy", "trace", *flags], check=False)


def ways(found: PacketTrace) -> object:
    """Return the outcomes of a trace, and the rules on its ways, without what only one of the sources has.

    The ways are sorted, because their order is that of the elements of a map in the kernel.
    """
    rules = [
        [(step.hook, step.effect, step.rule and (step.rule.chain, step.rule.number)) for step in path.steps]
        for path in found.paths
    ]
    return (
        found.answer,
        found.outcomes,
        [each.rule and each.rule.chain for each in found.unknowns],
        sorted(map(repr, rules)),
    )


@pytest.mark.parametrize(
    "scenario",
    ["session-affinity", "loadbalancer-source-ranges", "dual-stack", "random-11", "config-detect-bridge", "zone-hints"],
)
def test_own_table_is_read_without_nft(
    node: Namespace, nft: None, path_without_nft: str, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    program(node, "nftables", scenario)
    rows = [row for row in ROWS["nftables"] if row.scenario == scenario][::5]
    packets = [
        TracedPacket(source=source_of(row), destination=row.address, port=row.port, protocol=row.protocol)
        for row in rows
    ]

    def traced() -> list[object]:
        return [node.call(lambda packet=packet: ways(trace_kernel(packet, None))) for packet in packets]  # type: ignore[misc]

    expected = traced()
    monkeypatch.setenv("PATH", path_without_nft)
    assert traced() == expected


@BOTH_MODES
def test_command_needs_no_nft(lab: Lab, nft: None, path_without_nft: str, mode: str) -> None:
    node = lab.node.namespace
    program(node, mode, "nodeport")
    done = run_trace(node, path_without_nft, "--from=10.99.0.2", "--to=10.96.1.1:80", "--live", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["live"]["agrees"], found["live"]
    assert found["live"]["endpoint"].startswith("10.244.")
    assert all(rule["text"] for rule in found["live"]["rules"])


@pytest.mark.parametrize("own", [False, True], ids=["other program's table", "changed own table"])
def test_what_only_nft_can_read_is_named_on_one_line(
    node: Namespace, nft: None, path_without_nft: str, own: bool
) -> None:
    program(node, "nftables", "nodeport")
    flags = ("--from=10.244.1.5", "--to=10.96.1.1:80")
    hook = "chain c { type filter hook forward priority 0; policy"
    # Tables without rules and those of the other family do not matter.
    node.run(["nft", "-f", "-"], f"table inet empty {{ {hook} accept; }}; }}\ntable ip6 site {{ {hook} drop; }}; }}\n")
    assert run_trace(node, path_without_nft, *flags).returncode == 0
    if own:
        node.run(["nft", "insert rule ip kube-proxy services tcp dport 80 limit rate 5/second drop"])
    else:
        node.run(["nft", "-f", "-"], f"table inet site {{ {hook} drop; }}; }}\n")
    done = run_trace(node, path_without_nft, *flags)
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert "nft not found" in line
    assert ("ip kube-proxy" if own else "inet site") in line
    assert "--dump=FILE" in line
