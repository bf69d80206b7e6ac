"""Packets and outcomes that the tests of both simulators share."""

from __future__ import annotations

from typing import Any

from kproxy.simulate.packet import Packet, PacketOutcome, Verdict

NODE = "10.99.0.2"
POD = "10.244.1.9:8080"
FROM_NODE = {"source": NODE, "interface": ""}
"""The fields of a packet that a process on this node sends."""

ACCEPTED = PacketOutcome(Verdict.ACCEPTED)
DROPPED = PacketOutcome(Verdict.DROPPED)
TRANSLATED = PacketOutcome(Verdict.ACCEPTED, POD)


def packet(**changes: Any) -> Packet:
    """Return a packet from an external host to a ClusterIP, with the given fields changed."""
    defaults: dict[str, Any] = {
        "protocol": "TCP",
        "source": "198.51.100.1",
        "destination": "10.96.0.1",
        "port": 80,
        "interface": "eth0",
        "local_addresses": frozenset({NODE, "fd00:99::2"}),
    }
    return Packet(**defaults | changes)
