"""Baselines: samples of the same work without kproxy, under the names of the figures they belong to."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from tests.bench import cluster as objects
from tests.bench.cluster import Cluster
from tests.bench.commit_monitor import CommitMonitor
from tests.bench.kernel_objects import KernelObjects, flush, kernel_objects
from tests.bench.measurements import changed_slices, unconnected_services
from tests.bench.replay import Cost, Recording, RecordingProxy, replay, rules_per_service
from tests.bench.sizes import Repetitions
from tests.lab.namespace import Namespace

Samples = dict[str, list[float]]


def measure_baselines(
    mode: str, cluster: Cluster, repetitions: Repetitions, *, rolling_syncs: int
) -> tuple[Samples, KernelObjects]:
    """Measure all baselines; return them and the number of kernel objects after the first sync.

    `rolling_syncs` is the number of syncs that the daemon made for one rolling update.
    """
    namespace = Namespace("baseline")
    try:
        # The daemon's measurement has a listener too. With one, the kernel sends a notification for every element,
        # which takes time.
        with CommitMonitor(namespace) as monitor:
            baselines = _Baselines(mode, cluster, repetitions, monitor)
            kernel = namespace.call(lambda: baselines.measure(rolling_syncs))
            return baselines.samples, kernel
    finally:
        namespace.close()


class _Baselines:
    """Measures in the current network namespace."""

    def __init__(self, mode: str, cluster: Cluster, repetitions: Repetitions, monitor: CommitMonitor) -> None:
        self.samples: Samples = defaultdict(list)
        self._mode, self._cluster, self._repetitions = mode, cluster, repetitions
        self._monitor = monitor

    def measure(self, rolling_syncs: int) -> KernelObjects:
        """Take all samples; return the number of kernel objects after the first sync."""
        repetitions, proxy = self._repetitions, RecordingProxy(self._mode, self._cluster)
        first_sync = proxy.change()
        for _ in range(repetitions.first_syncs):
            flush()
            self._sample("first sync", first_sync)
        if self._mode == "iptables":
            self._first_sync_in_blocks(repetitions.first_syncs)
        flush()
        self._replay(first_sync)
        kernel = kernel_objects()
        for name in KernelObjects.__struct_fields__:
            self.samples[f"kernel: {name}"].append(getattr(kernel, name))
        if repetitions.endpoint_changes:
            self._endpoints(proxy, repetitions.endpoint_changes)
            self._services(proxy, repetitions.service_changes)
            for _ in range(repetitions.rolling_updates):
                self._rolling_update(proxy, repetitions.rolling_endpoints, rolling_syncs)
            for _ in range(repetitions.bursts):
                self._burst(proxy, repetitions.burst_changes)
            for _ in range(repetitions.annotation_bursts):
                parsing = _parsing_seconds(self._cluster, repetitions.burst_changes)
                for encoding in ("JSON", "protobuf"):
                    self.samples[f"event, {encoding}: CPU"].append(parsing)
        return kernel

    def _replay(self, recording: Recording) -> Cost:
        self._monitor.clear()
        return replay(recording, self._monitor)

    def _sample(self, name: str, recording: Recording) -> None:
        cost = self._replay(recording)
        self.samples[name].append(cost.seconds)
        self.samples[f"{name}: CPU"].append(cost.cpu)

    def _first_sync_in_blocks(self, count: int) -> None:
        """Write the same rules in blocks of 25 Services with one program start per block, the obvious design."""
        flush()
        max_rules = 25 * rules_per_service(self._cluster.endpoints)
        recorded = RecordingProxy(self._mode, self._cluster, max_transaction_rules=max_rules).change()
        for _ in range(count):
            flush()
            cost = self._replay([(recorder, [text]) for recorder, texts in recorded for text in texts])  # type: ignore[misc]
            self.samples["first sync: in blocks"].append(cost.seconds)

    def _endpoints(self, proxy: RecordingProxy, count: int) -> None:
        numbers = unconnected_services(self._cluster)
        for turn in range(count):
            number = numbers[turn * len(numbers) // count]
            change = proxy.change(put=[self._cluster.endpoint_slice(number, variant=turn + 1)])
            reverse = proxy.change(put=[self._cluster.endpoint_slice(number)])
            self._sample("one endpoint", change)
            self._sample("one endpoint", reverse)

    def _services(self, proxy: RecordingProxy, count: int) -> None:
        for number in range(self._cluster.services, self._cluster.services + count):
            service, slices = self._cluster.service(number), self._cluster.endpoint_slices(number)
            proxy.change(put=slices)
            new, deleted = proxy.change(put=[service]), proxy.change(delete=[service])
            self._sample("new Service", new)
            self._sample("deleted Service", deleted)
            proxy.change(delete=slices)

    def _rolling_update(self, proxy: RecordingProxy, endpoints: int, syncs: int) -> None:
        initial = [objects.rolling_slice(endpoints, 0), objects.rolling_service()]
        proxy.change(put=initial)
        steps: Sequence[Recording] = [
            proxy.change(put=[objects.rolling_slice(endpoints, endpoints * step // syncs)])
            for step in range(1, syncs + 1)
        ]
        reverse = proxy.change(put=initial)
        costs = [self._replay(each) for each in steps]
        self._replay(reverse)
        proxy.change(delete=initial)
        self.samples["rolling update"].append(costs[-1].seconds)
        self.samples["rolling update: CPU/change"].append(sum(each.cpu for each in costs) / endpoints)

    def _burst(self, proxy: RecordingProxy, count: int) -> None:
        change, reverse = (
            proxy.change(put=changed_slices(self._cluster, count, variants=variants)) for variants in (True, False)
        )
        for each in (change, reverse):
            cost = self._replay(each)
            self.samples["burst"].append(cost.seconds)
            self.samples["burst: CPU/change"].append(cost.cpu / count)


def _parsing_seconds(cluster: Cluster, count: int) -> float:
    """Return the CPU seconds that a parser takes to find the end of one event's JSON, without decoding anything."""
    lines = [msgspec.json.encode(each) for each in changed_slices(cluster, count, variants=False)]
    decoder = msgspec.json.Decoder(msgspec.Raw)
    start = time.thread_time()
    for line in lines:
        decoder.decode(line)
    return (time.thread_time() - start) / count
