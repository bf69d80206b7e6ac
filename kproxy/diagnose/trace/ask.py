"""Put together what a trace needs: the packet, the rules, and what is known about the node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from kproxy.diagnose.trace.cluster_objects import ClusterAddresses
from kproxy.diagnose.trace.dumps import Dumps
from kproxy.diagnose.trace.flow import Bits, Flow, Interface, TraceFacts, address_text, number_of
from kproxy.diagnose.trace.kernel import (
    KernelError,
    Routes,
    forwards,
    has_legacy_tables,
    read_addresses,
    read_recent_lists,
    read_rules,
    rule_handles,
)
from kproxy.diagnose.trace.live import WatchedFlow, WatchedPacket, watch
from kproxy.diagnose.trace.program import RuleSource
from kproxy.diagnose.trace.trace import (
    PacketTrace,
    Question,
    TraceConnection,
    TracedRule,
    TraceLive,
    TracePath,
    trace,
    traced_rule,
)
from kproxy.host.ctnetlink import TrackedConnection, read_connections
from kproxy.host.nf_tables_trace import TABLE, TraceEvent
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


class KernelTrace:
    """A trace of a packet through the rules of this node's kernel."""

    def __init__(self, packet: TracedPacket, objects: ClusterAddresses | None) -> None:
        """Read the rules and trace the packet. Raises `KernelError`."""
        self._packet = packet
        self._family = family_of(packet.destination)
        self._program = read_rules(self._family).program()
        self.report = self._trace(objects)

    @property
    def node_sends(self) -> bool:
        """Whether the node itself sends the packet."""
        return self.report.interface == ""

    def _trace(self, objects: ClusterAddresses | None) -> PacketTrace:
        family, packet = self._family, self._packet
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
        entries: list[TrackedConnection] = []
        notes = []
        try:
            entries = read_connections(family, packet.protocol, packet.source, packet.destination, packet.port)
        except OSError as error:
            notes.append(f"the connections in conntrack cannot be read: {error.strerror or error}")
        question = replace(
            question,
            interface_from_route=interface is None and bool(flow.iif.name),
            connections=tuple(map(_connection, entries)),
            notes=tuple(notes),
        )
        known = next((each for each in entries if each.source_port == packet.source_port), None)
        report = trace(self._program, _continued(flow, known) if known else flow, question)
        notes = [f"this node has no route to {address_text(family, address)}" for address in routes.missing()]
        if not forwards(family):
            notes.append(f"this node does not forward {family.value} packets (sysctl)")
        return replace(report, notes=(*report.notes, *notes))

    def watch(self, ready: Callable[[], object] = lambda: None) -> PacketTrace:
        """Watch a real packet of the flow, and compare it with the prediction. Raises `KernelError`.

        `ready` is called when packets are watched.
        """
        packet = self._packet
        if has_legacy_tables(self._family):
            raise KernelError(
                "--live cannot follow packets through iptables-legacy: its rules have no tracing of nftables"
            )
        flow = WatchedFlow(
            family=self._family,
            source=packet.source,
            destination=packet.destination,
            port=packet.port,
            protocol=packet.protocol,
            sends=self.node_sends,
        )
        watched = watch(flow, ready)
        live = compare_live(self.report, watched, self._matched_rules(watched) if watched else ())
        if live.agrees is False:
            summary = f"{self.report.summary}; but the kernel has treated a real packet differently"
            return replace(self.report, live=live, answer="unknown", summary=summary)
        return replace(self.report, live=live)

    def _matched_rules(self, watched: WatchedPacket) -> Iterator[TracedRule]:
        """Yield the rules that a real packet has matched, as the program names them."""
        handles: dict[tuple[str, str], list[int]] = {}  # of chains whose rules were read without their handles
        for event in watched.events:
            if event.kind != "rule" or event.table == TABLE:
                continue
            place = (event.table, event.chain)
            owner = _IPTABLES_NAMES.get(event.family, event.family)
            if (owner, *place) not in self._program.chains:
                owner = event.family
            sources = [rule.source for rule in self._program.chains.get((owner, *place), ())]
            if sources and not sources[0].handle and place not in handles:
                handles[place] = rule_handles(self._family, *place)
            numbers = {handle: number for number, handle in enumerate(handles.get(place, ()), 1)}
            known = (each for each in sources if _is_rule(each, event, numbers.get(event.handle, 0)))
            # Without a text: it was not there when the rules were read.
            yield traced_rule(next(known, RuleSource(owner, *place, handle=event.handle)))


def _is_rule(source: RuleSource, event: TraceEvent, number: int) -> bool:
    """Return whether an event is about a rule, given the number of the event's rule in its chain, 0 if unknown."""
    return source.handle == event.handle if source.handle else source.number == number


_IPTABLES_NAMES = {"ip": "iptables", "ip6": "ip6tables"}


def trace_kernel(packet: TracedPacket, objects: ClusterAddresses | None) -> PacketTrace:
    """Trace a packet through the rules of this node's kernel. Raises `KernelError`."""
    return KernelTrace(packet, objects).report


def compare_live(report: PacketTrace, watched: WatchedPacket | None, rules: Iterable[TracedRule]) -> TraceLive:
    """Return what the kernel did with a packet, and whether one of the predicted ways is the same.

    The rules must be the same and in the same order, and the packet must end the same: its verdict, its endpoint, and
    whether it is masqueraded. `rules` are those that the packet has matched.
    """
    if watched is None:
        return TraceLive(seen=False)
    matched = tuple(rules)
    if watched.events[-1].drops:
        live = TraceLive(seen=True, verdict="dropped", rules=matched)
    else:
        live = TraceLive(
            seen=True,
            verdict="accepted",
            rules=matched,
            endpoint=watched.endpoint,
            masqueraded=_is_masqueraded(watched.connection, node_sends=report.interface == ""),
        )
    skipped = any(step.effect == "unknown" for path in report.paths for step in path.steps)
    agrees = any((skipped or _matched(path) == matched) and _same_end(path, live) for path in report.paths)
    return replace(live, agrees=agrees)


def _is_masqueraded(entry: TrackedConnection | None, *, node_sends: bool) -> bool | None:
    """Return whether a connection is masqueraded, or None if that is unknown.

    Packets of the node itself can have the same source address in both cases.
    """
    if entry is None:
        return None
    if entry.reply_destination != entry.source:
        return True
    return None if node_sends else False


def _same_end(path: TracePath, live: TraceLive) -> bool:
    """Return whether a predicted way ends as the real packet did, as far as both are known."""
    outcome = path.outcome
    if (outcome.verdict == "accepted") != (live.verdict == "accepted"):
        return False
    if outcome.verdict != "accepted":
        return True
    if outcome.destination and outcome.destination != live.endpoint:
        return False
    return None in (outcome.masqueraded, live.masqueraded) or outcome.masqueraded == live.masqueraded


def _matched(path: TracePath) -> tuple[TracedRule, ...]:
    """Return the rules that a predicted packet matches, in order."""
    rules = [step.rule for step in path.steps if step.rule is not None and step.effect != "policy-drop"]
    return tuple(rule for rule, before in zip(rules, [None, *rules], strict=False) if rule != before)


def _connection(entry: TrackedConnection) -> TraceConnection:
    return TraceConnection(
        client=socket_text(entry.source, entry.source_port),
        endpoint=socket_text(entry.reply_source, entry.reply_source_port),
        masqueraded=entry.reply_destination != entry.source,
        state=entry.state,
    )


def _continued(flow: Flow, entry: TrackedConnection) -> Flow:
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
