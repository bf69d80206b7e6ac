"""What the kernel says of this process, as far as `prometheus_client.ProcessCollector` leaves it out."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

NETSTAT = Path("/proc/self/net/netstat")
UNLIMITED = 2**64 - 1
"""How Go's collector shows a limit that is none."""


class MoreProcessMetrics(Collector):
    """The address space limit of this process, and the traffic of its network namespace (as Go's collector)."""

    def collect(self) -> Iterator[Metric]:
        """Return what holds now; what the kernel does not tell is left out."""
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        yield GaugeMetricFamily(
            "process_virtual_memory_max_bytes",
            "How much address space this process may use.",
            value=UNLIMITED if limit == resource.RLIM_INFINITY else limit,
        )
        try:
            traffic = ip_traffic(NETSTAT.read_text())
        except OSError:
            return
        for name, field, verb in (("receive", "InOctets", "came in"), ("transmit", "OutOctets", "went out")):
            if field in traffic:
                yield CounterMetricFamily(
                    f"process_network_{name}_bytes_total",
                    f"Bytes of IP packets that {verb} in this process's network namespace.",
                    value=traffic[field],
                )


def ip_traffic(netstat: str) -> dict[str, int]:
    """Return the fields of group IpExt of `/proc/net/netstat`, where a line of names precedes a line of numbers."""
    rows = [line.split()[1:] for line in netstat.splitlines() if line.startswith("IpExt:")]
    return dict(zip(rows[0], map(int, rows[1]), strict=False)) if len(rows) == 2 else {}


class PacketCounters(Collector):
    """Counters that the kernel keeps, read when they are asked for.

    `counters` are name, help and a way to read each, which returns None where there is no such counter.
    """

    def __init__(self, counters: Mapping[tuple[str, str], Callable[[], int | None]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        """Return what the kernel has counted."""
        for (name, text), read in self._counters.items():
            packets = read()
            if packets is not None:
                yield CounterMetricFamily(name, text, value=packets)
