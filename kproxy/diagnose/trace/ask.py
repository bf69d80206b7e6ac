"""Put together what a trace needs: the packet, the rules, and what is known about the node."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from kproxy.diagnose.trace.cluster_objects import ClusterAddresses
from kproxy.diagnose.trace.dumps import Dumps
from kproxy.diagnose.trace.flow import Facts, Flow, Interface, number_of
from kproxy.diagnose.trace.trace import PacketTrace, Question, trace
from kproxy.model.addresses import family_of
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
    facts = Facts(
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


def question_of(packet: TracedPacket, facts: Facts, objects: ClusterAddresses) -> Question:
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
    raise NotImplementedError
