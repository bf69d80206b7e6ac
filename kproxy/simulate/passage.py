"""A packet on its way through this node, as rules see it at one point."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from msgspec import Struct
from msgspec.structs import replace

from kproxy.model.types import Family
from kproxy.simulate.packet import Fate, Packet, Verdict

_LOOPBACK = {Family.IPV4: ip_network("127.0.0.0/8"), Family.IPV6: ip_network("::1/128")}


class Passage(Struct, frozen=True):
    """What rules can look at and change. Addresses are numbers; `local` are the node's own.

    `interface` is the one that the packet came in by, "" before it has come in by any. `verdict` stays None for as
    long as the packet is on its way.
    """

    packet: Packet
    local: frozenset[int]
    source: int
    destination: int
    port: int
    interface: str
    mark: int = 0
    target: str = ""
    masqueraded: bool = False
    remembered: bool = False
    counted: tuple[str, ...] = ()
    verdict: Verdict | None = None
    reply: str = ""

    @classmethod
    def begin(cls, packet: Packet) -> Passage:
        """Return a packet before its first rule; `ValueError` for what is no address, or of another family."""
        source, destination = ip_address(packet.source), ip_address(packet.destination)
        if source.version != destination.version:
            raise ValueError(f"{packet.source} cannot send to {packet.destination}: not of one family")
        local = frozenset(int(ip_address(address)) for address in packet.local_addresses)
        return cls(packet, local, int(source), int(destination), packet.port, packet.interface)

    def is_local(self, address: int) -> bool:
        """Whether an address of the packet's family is one of this node's."""
        loopback = _LOOPBACK[self.packet.family]
        return address in self.local or address & int(loopback.netmask) == int(loopback.network_address)

    def translate(self, target: str, address: int, port: int) -> Passage:
        """Return the packet on its way to another destination, `target` its text."""
        return replace(self, target=target, destination=address, port=port)

    def end(self, verdict: Verdict, reply: str = "") -> Passage:
        """Return the packet as one that goes no further."""
        return replace(self, verdict=verdict, reply=reply)

    def fate(self) -> Fate:
        """Return what has become of the packet; one that nothing stopped has arrived."""
        verdict = self.verdict or Verdict.ACCEPTED
        return Fate(verdict, self.target, self.masqueraded, self.remembered, self.reply, self.counted)
