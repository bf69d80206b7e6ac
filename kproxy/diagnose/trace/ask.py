"""Put together what a trace needs: the packet, the rules, and what is known about the node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.trace.cluster_objects import ClusterAddresses
from kproxy.diagnose.trace.connections import ConnectionEntry
from kproxy.diagnose.trace.dumps import Dumps
from kproxy.diagnose.trace.flow import Bits, Flow, Interface, TraceFacts, address_text, number_of
from kproxy.diagnose.trace.kernel import (
    KernelError,
    Routes,
    forwards,
    has_legacy_tables,
    read_addresses,
    read_entries,
    read_recent_lists,
    read_rules,
)
from kproxy.diagnose.trace.live import LiveEvent, WatchedFlow, watch
from kproxy.diagnose.trace.trace import (
    PacketTrace,
    Question,
    TraceConnection,
    TracedRule,
    TraceLive,
    TracePath,
    trace,
)
from kproxy.model.addresses import family_of, socket_text
from kproxy.model.types import Protocol


class TracedPacket(Struct, frozen=True, kw_only=True):
    """The first packet of a connection, as the user describes it. `interface` is None if it is not given."""

    source: str
    destination: str
    port: int
    protocol: Protocol
    source_port: int | None = None
    source_name: str = ""
    interface: str | None = None


def trace_dumps(
    packet: TracedPacket, dumps: Dumps, addresses: Iterable[str], objects: ClusterAddresses | None, node: str
) -> PacketTrace:
    """Trace a packet through the rules in dumps. `addresses` are all addresses of the node, or none if unknown."""
    own = list(addresses)
    objects = objects or ClusterAddresses()
    from_node = own or list(objects.nodes.get(node, ()))
    facts = TraceFacts(
        local_addresses=_numbers(from_node, packet),
        complete=bool(own),
        foreign_addresses=_numbers(objects.foreign_to(node), packet) if node or own or objects.nodes else frozenset(),
    )
    interface = packet.interface
    if interface is None and number_of(packet.source) in facts.local_addresses:
        interface = ""
    return trace(dumps.program(), flow_of(packet, Interface(interface)), question_of(packet, facts, objects))


def flow_of(packet: TracedPacket, iif: Interface) -> Flow:
    """Return the packet as the rules see it."""
    destination = number_of(packet.destination)
    return Flow(
        family=family_of(packet.destination),
        protocol=packet.protocol,
        source=number_of(packet.source),
        source_port=packet.source_port,
        destination=destination,
        port=packet.port,
        original=(destination, packet.port),
        iif=iif,
    )


def question_of(packet: TracedPacket, facts: TraceFacts, objects: ClusterAddresses) -> Question:
    """Return the names and facts for a trace."""
    nodes = {address: node for address, node in objects.endpoint_nodes.items() if node}
    nodes |= {address: name for name, addresses in objects.nodes.items() for address in addresses}
    source = f"{packet.source} ({packet.source_name})" if packet.source_name else packet.source
    return Question(
        facts=facts,
        nodes=nodes,
        reachable=frozenset({*objects.pod_names, *objects.endpoint_nodes}),
        source_name=source,
    )


def _numbers(addresses: Iterable[str], packet: TracedPacket) -> frozenset[int]:
    version = family_of(packet.destination)
    return frozenset(number_of(address) for address in addresses if address and family_of(address) is version)


def trace_kernel(packet: TracedPacket, objects: ClusterAddresses | None) -> PacketTrace:
    """Trace a packet through the rules of this node's kernel. Raises `KernelError`."""
    family = family_of(packet.destination)
    program = read_rules(family).program()
    routes = Routes(family)
    facts = TraceFacts(
        local_addresses=frozenset(map(number_of, read_addresses(family))),
        complete=True,
        recent={name: frozenset(map(number_of, addresses)) for name, addresses in read_recent_lists().items()},
        recent_may_have_expired=True,
        interface_to=routes.interface_to,
    )
    source, interface = number_of(packet.source), packet.interface
    flow = flow_of(packet, Interface(interface))
    if interface is None:
        own = facts.is_local(flow, source)
        flow = replace(flow, iif=Interface("" if own else routes.interface_to(source)))
    question = question_of(packet, facts, objects or ClusterAddresses())
    entries = read_entries(packet.protocol, packet.source, packet.destination, packet.port)
    question = replace(
        question,
        interface_from_route=interface is None and bool(flow.iif.name),
        connections=tuple(map(_connection, entries or ())),
        notes=() if entries is not None else ("the connections in conntrack cannot be read: conntrack not found",),
    )
    known = next((each for each in entries or () if each.source_port == packet.source_port), None)
    report = trace(program, _continued(flow, known) if known else flow, question)
    notes = [f"this node has no route to {address_text(family, address)}" for address in routes.missing()]
    if not forwards(family):
        notes.append(f"this node does not forward {family.value} packets (sysctl)")
    return replace(report, notes=(*report.notes, *notes))


def with_live_packet(report: PacketTrace, packet: TracedPacket) -> PacketTrace:
    """Watch a real packet of the flow, and compare it with the prediction. Raises `KernelError`."""
    family = family_of(packet.destination)
    if has_legacy_tables(family):
        raise KernelError("--live cannot follow packets through iptables-legacy: its rules have no tracing of nftables")
    sends = report.interface == ""
    events = watch(
        WatchedFlow(
            family=family,
            source=packet.source,
            destination=packet.destination,
            port=packet.port,
            protocol=packet.protocol,
            sends=sends,
        )
    )
    live = compare_live(report, events)
    if live.agrees is False:
        summary = f"{report.summary}; but the kernel has treated a real packet differently"
        return replace(report, live=live, answer="unknown", summary=summary)
    return replace(report, live=live)


def compare_live(report: PacketTrace, events: list[LiveEvent]) -> TraceLive:
    """Return what the kernel did with a packet, and whether one of the predicted ways is the same, rule by rule."""
    if not events:
        return TraceLive(seen=False)
    rules = [event for event in events if event.kind == "rule"]
    actual = [(event.family, event.table, event.chain) for event in rules]
    dropped = events[-1].verdict == "drop" or "reject" in events[-1].text
    verdict: Literal["accepted", "dropped"] = "dropped" if dropped else "accepted"
    ways = [_matched(path) for path in report.paths]
    skipped = any(step.effect == "unknown" for path in report.paths for step in path.steps)
    fates = {"accepted" if path.outcome.verdict == "accepted" else "dropped" for path in report.paths}
    return TraceLive(
        seen=True,
        verdict=verdict,
        agrees=actual in ways or (skipped and verdict in fates),
        rules=tuple(
            TracedRule(family=each.family, table=each.table, chain=each.chain, text=each.text) for each in rules
        ),
    )


def _matched(path: TracePath) -> list[tuple[str, str, str]]:
    """Return the chains of the rules that a predicted packet matches, in order, as nft names them."""
    rules = [step.rule for step in path.steps if step.rule is not None and step.effect != "policy-drop"]
    distinct = [rule for rule, before in zip(rules, [None, *rules], strict=False) if rule != before]
    return [(_NFT_NAMES.get(rule.family, rule.family), rule.table, rule.chain) for rule in distinct]


_NFT_NAMES = {"iptables": "ip", "ip6tables": "ip6"}


def _connection(entry: ConnectionEntry) -> TraceConnection:
    return TraceConnection(
        client=socket_text(entry.source, entry.source_port),
        endpoint=socket_text(entry.reply_source, entry.reply_source_port),
        masqueraded=entry.reply_destination != entry.source,
        state=entry.state,
    )


def _continued(flow: Flow, entry: ConnectionEntry) -> Flow:
    """Return the next packet of a connection that exists: its entry decides about NAT, not the rules."""
    translated = (entry.reply_source, entry.reply_source_port) != (entry.destination, entry.port)
    endpoint = (number_of(entry.reply_source), entry.reply_source_port)
    return replace(
        flow,
        entry="established" if entry.replied else "new",
        restored=endpoint if translated else None,
        dnat=socket_text(entry.reply_source, entry.reply_source_port) if translated else "",
        snat=entry.reply_destination if entry.reply_destination != entry.source else "",
        destination_settled=True,
        source_settled=True,
        connection_mark=Bits(0, 0),
    )
