"""The content of the `/metrics` page: the metrics of the daemon and of its process in Prometheus' text format.

prometheus-client defines the format. It takes 2 MB of memory and 15 ms of CPU time; this module is therefore imported
by the first scrape, and only this module imports the library.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kproxy.model.connection_counts import ServicePortName
from kproxy.serve.metric_definitions import FAMILY, MetricDefinitions
from kproxy.serve.metric_values import Counter, Gauge, Histogram

NETSTAT = Path("/proc/self/net/netstat")
UNLIMITED = 2**64 - 1
"""The value that Go's process collector reports if the limit is not set."""


def render(metrics: MetricDefinitions) -> bytes:
    """Return the page with the current values."""
    return generate_latest(_Page(metrics))


class _Page(Collector):
    """All metrics. There are no `..._created` series, which kube-proxy does not have."""

    def __init__(self, metrics: MetricDefinitions) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Return the current values."""
        for metric in self._metrics.recorded:
            yield _recorded(metric)
        yield from _packet_counters(self._metrics)
        yield _api_contacts(self._metrics)
        yield from _localhost_node_ports(self._metrics)
        yield from _service_connections(self._metrics)
        yield from ProcessCollector(registry=None).collect()
        yield from _process_limits()


def _recorded(metric: Counter | Gauge | Histogram) -> Metric:
    if isinstance(metric, Histogram):
        return _histogram(metric)
    kind = CounterMetricFamily if isinstance(metric, Counter) else GaugeMetricFamily
    family = kind(metric.name, metric.text, labels=metric.labels)
    for labels, value in metric.values().items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: Histogram) -> Metric:
    family = HistogramMetricFamily(metric.name, metric.text, labels=metric.labels)
    bounds = [*map(floatToGoString, metric.bounds), "+Inf"]
    for labels, series in metric.values().items():
        family.add_metric(labels, list(zip(bounds, accumulate(series.counts), strict=True)), series.total)
    return family


def _packet_counters(metrics: MetricDefinitions) -> Iterator[Metric]:
    """Yield the packet counters that the kernel has."""
    for (name, text), read in metrics.packet_counters.items():
        packets = read()
        if packets is not None:
            yield CounterMetricFamily(name, text, value=packets)


def _api_contacts(metrics: MetricDefinitions) -> Metric:
    family = GaugeMetricFamily(
        "kproxy_api_last_contact_timestamp_seconds",
        "Unix time at which the API server last sent an object, a list or a bookmark of a kind.",
        labels=("kind",),
    )
    for kind, seconds in metrics.api_contacts().items():
        family.add_metric((kind,), seconds)
    return family


def _localhost_node_ports(metrics: MetricDefinitions) -> Iterator[Metric]:
    prefix = "kubeproxy_nftables_localhost_nodeport"
    listeners = GaugeMetricFamily(
        f"{prefix}_listeners", "Number of NodePorts that kproxy serves on the loopback address.", labels=FAMILY
    )
    failures = CounterMetricFamily(
        f"{prefix}_listener_creation_failures_total",
        "Number of failures to listen on a NodePort of the loopback address.",
        labels=FAMILY,
    )
    rejected = CounterMetricFamily(
        f"{prefix}_rejected_packets_total",
        "Number of packets rejected because they were for a NodePort on a loopback address.",
        labels=(*FAMILY, "protocol"),
    )
    for family, each in metrics.localhost_node_ports().items():
        if each.listeners is not None:
            listeners.add_metric((family.value,), each.listeners)
        if each.failures is not None:
            failures.add_metric((family.value,), each.failures)
        for protocol, packets in each.rejected.items():
            rejected.add_metric((family.value, protocol), packets)
    yield from (each for each in (listeners, failures, rejected) if each.samples)


def _service_connections(metrics: MetricDefinitions) -> Iterator[Metric]:
    if metrics.service_connections is None:
        return
    family = CounterMetricFamily(
        "kproxy_service_connections_total",
        "Number of connections to a port of a Service on this node. Without labels: to all other ports.",
        labels=ServicePortName._fields,
    )
    for name, connections in metrics.service_connections().items():
        family.add_metric(name, connections)
    yield family


def _process_limits() -> Iterator[Metric]:
    """Yield the metrics that Go's process collector reports and prometheus-client does not.

    They are the address space limit of this process and the IP traffic of its network namespace. Metrics whose values
    the kernel does not provide are omitted.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    yield GaugeMetricFamily(
        "process_virtual_memory_max_bytes",
        "Limit of the virtual memory size of this process in bytes.",
        value=UNLIMITED if limit == resource.RLIM_INFINITY else limit,
    )
    try:
        traffic = ip_traffic(NETSTAT.read_text())
    except OSError:
        return
    for name, field, verb in (("receive", "InOctets", "received"), ("transmit", "OutOctets", "sent")):
        if field in traffic:
            yield CounterMetricFamily(
                f"process_network_{name}_bytes_total",
                f"Number of IP bytes {verb} in the network namespace of this process.",
                value=traffic[field],
            )


def ip_traffic(netstat: str) -> dict[str, int]:
    """Return the values of the IpExt lines in `/proc/net/netstat` by field name, such as `InOctets` (in bytes).

    One line contains the names and the next line the values. Return an empty dict if the two lines are missing. Values
    that are not numbers are omitted.
    """
    rows = [line.split()[1:] for line in netstat.splitlines() if line.startswith("IpExt:")]
    pairs = zip(*rows, strict=False) if len(rows) == 2 else ()
    return {name: int(value) for name, value in pairs if value.isascii() and value.isdigit()}
