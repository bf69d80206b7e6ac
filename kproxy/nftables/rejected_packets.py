"""Read how many packets to NodePorts on loopback addresses were rejected."""

from __future__ import annotations

import logging

from kproxy.host.netlink import DumpInterruptedError, retry_interrupted
from kproxy.model.types import Family, Protocol
from kproxy.nftables.decode import TableReader
from kproxy.nftables.elements import PROTOCOLS
from kproxy.nftables.names import rejected_counter

log = logging.getLogger(__name__)


def rejected_packets(family: Family) -> dict[Protocol, int]:
    """Return the number of rejected packets of each protocol. Protocols without a counter are omitted."""
    try:
        counters = retry_interrupted(TableReader(family).counters)
    except (DumpInterruptedError, OSError) as error:
        log.debug("%s: cannot read the counters of rejected packets: %s", family.value, error)
        return {}
    found = {protocol: counters.get(rejected_counter(protocol)) for protocol in PROTOCOLS}
    return {protocol: packets for protocol, packets in found.items() if packets is not None}
