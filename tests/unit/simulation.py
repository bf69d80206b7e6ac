"""What the tests of both simulators send, and what becomes of it."""

from __future__ import annotations

from typing import Any

from kproxy.simulate.packet import Packet, PacketOutcome, Verdict

NODE = "10.99.0.2"
POD = "10.244.1.9:8080"
OWN = {"source": NODE, "interface": ""}
"""What is different for a packet of this node's own."""

ACCEPTED = PacketOutcome(Verdict.ACCEPTED)
DROPPED = PacketOutcome(Verdict.DROPPED)
TRANSLATED = PacketOutcome(Verdict.ACCEPTED, POD)


def packet(**changes: Any) -> Packet:
    """Return a packet from a host outside to a port of somewhere behind this node, less what is said."""
    usual: dict[str, Any] = {
        "protocol": "TCP",
        "source": "198.51.100.1",
        "destination": "10.96.0.1",
        "port": 80,
        "interface": "eth0",
        "local_addresses": frozenset({NODE, "fd00:99::2"}),
    }
    return Packet(**usual | changes)
