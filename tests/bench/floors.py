"""The floors: samples of the same work without kproxy, under the names of the figures that they are floors of."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from tests.bench import cluster as objects
from tests.bench.cluster import Cluster
from tests.bench.efforts import Effort
from tests.bench.measured import changed_slices, spare
from tests.bench.mirror import Cost, Mirror, Recording, replay, rules_of_service
from tests.bench.notices import Notices
from tests.bench.rules import KernelObjects, flush, kernel_objects
from tests.lab.namespace import Namespace

Samples = dict[str, list[float]]


def take_all(mode: str, cluster: Cluster, effort: Effort, *, rolling_syncs: int) -> tuple[Samples, KernelObjects]:
    """Measure all floors; return them, and what the kernel held after the first sync.

    `rolling_syncs` is how many syncs the daemon made of a rolling update.
    """
    namespace = Namespace("floor")
    try:
        # With a listener, as the daemon has one: telling it of every element takes the kernel some time.
        with Notices(namespace) as notices:
            floors = _Floors(mode, cluster, effort, notices)
            kernel = namespace.call(lambda: floors.take_all(rolling_syncs))
            return floors.samples, kernel
    finally:
        namespace.close()


class _Floors:
    """Everything happens in the namespace that it is called in."""

    def __init__(self, mode: str, cluster: Cluster, effort: Effort, notices: Notices) -> None:
        self.samples: Samples = defaultdict(list)
        self._mode, self._cluster, self._effort = mode, cluster, effort
        self._notices = notices

    def take_all(self, rolling_syncs: int) -> KernelObjects:
        """Take all samples; return what the kernel held after the first sync."""
        effort, mirror = self._effort, Mirror(self._mode, self._cluster)
        everything = mirror.change()
        for _ in range(effort.first_syncs):
            flush()
            self._note("first sync", everything)
        if self._mode == "iptables":
            self._first_sync_apart(effort.first_syncs)
        flush()
        self._replay(everything)
        kernel = kernel_objects()
        for name in KernelObjects.__struct_fields__:
            self.samples[f"kernel: {name}"].append(getattr(kernel, name))
        if effort.changes:
            self._endpoints(mirror, effort.changes)
            self._services(mirror, effort.services)
            for _ in range(effort.rollings):
                self._rolling(mirror, effort.rolled, rolling_syncs)
            for _ in range(effort.bursts):
                self._burst(mirror, effort.burst)
            for _ in range(effort.idles):
                parsed = _parsing(self._cluster, effort.burst)
                for form in ("JSON", "protobuf"):
                    self.samples[f"event, {form}: CPU"].append(parsed)
        return kernel

    def _replay(self, recording: Recording) -> Cost:
        self._notices.forget()
        return replay(recording, self._notices)

    def _note(self, name: str, recording: Recording) -> None:
        cost = self._replay(recording)
        self.samples[name].append(cost.seconds)
        self.samples[f"{name}: CPU"].append(cost.cpu)

    def _first_sync_apart(self, times: int) -> None:
        """Write the same rules in blocks of 25 Services with a program for each, which is how one would begin."""
        flush()
        apart = Mirror(
            self._mode, self._cluster, max_transaction_rules=25 * rules_of_service(self._cluster.endpoints)
        ).change()
        for _ in range(times):
            flush()
            cost = self._replay([(recorder, [text]) for recorder, texts in apart for text in texts])  # type: ignore[misc]
            self.samples["first sync: in blocks"].append(cost.seconds)

    def _endpoints(self, mirror: Mirror, count: int) -> None:
        numbers = spare(self._cluster)
        for turn in range(count):
            number = numbers[turn * len(numbers) // count]
            there = mirror.change(put=[self._cluster.endpoint_slice(number, shift=turn + 1)])
            back = mirror.change(put=[self._cluster.endpoint_slice(number)])
            self._note("one endpoint", there)
            self._note("one endpoint", back)

    def _services(self, mirror: Mirror, count: int) -> None:
        for number in range(self._cluster.services, self._cluster.services + count):
            service, found = self._cluster.service(number), self._cluster.endpoint_slice(number)
            mirror.change(put=[found])
            new, deleted = mirror.change(put=[service]), mirror.change(delete=[service])
            self._note("new Service", new)
            self._note("deleted Service", deleted)
            mirror.change(delete=[found])

    def _rolling(self, mirror: Mirror, endpoints: int, syncs: int) -> None:
        there = [objects.rolling_slice(endpoints, 0), objects.rolling_service()]
        mirror.change(put=there)
        steps: Sequence[Recording] = [
            mirror.change(put=[objects.rolling_slice(endpoints, endpoints * step // syncs)])
            for step in range(1, syncs + 1)
        ]
        back = mirror.change(put=there)
        costs = [self._replay(each) for each in steps]
        self._replay(back)
        mirror.change(delete=there)
        self.samples["rolling update"].append(costs[-1].seconds)
        self.samples["rolling update: CPU/change"].append(sum(each.cpu for each in costs) / endpoints)

    def _burst(self, mirror: Mirror, count: int) -> None:
        there, back = (
            mirror.change(put=changed_slices(self._cluster, count, shifted=shifted)) for shifted in (True, False)
        )
        for each in (there, back):
            cost = self._replay(each)
            self.samples["burst"].append(cost.seconds)
            self.samples["burst: CPU/change"].append(cost.cpu / count)


def _parsing(cluster: Cluster, count: int) -> float:
    """Return the CPU seconds that finding the end of one event's JSON takes, of which nothing is kept."""
    lines = [msgspec.json.encode(each) for each in changed_slices(cluster, count, shifted=False)]
    decoder = msgspec.json.Decoder(msgspec.Raw)
    began = time.thread_time()
    for line in lines:
        decoder.decode(line)
    return (time.thread_time() - began) / count
