"""Measurements of the daemon: samples of every figure for one mode and cluster size."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from msgspec import Struct

from tests.bench import cluster as objects
from tests.bench.api_server import BenchApiServer
from tests.bench.cluster import TARGET_PORT, Cluster
from tests.bench.connections import Round, measure
from tests.bench.daemon import MeasuredDaemon
from tests.bench.kernel_objects import KernelObjects, kernel_objects
from tests.bench.sizes import Repetitions
from tests.bench.testbed import Testbed
from tests.bench.throughput import measure_throughput

DIRECT_TARGETS = 10
"""Number of the server pod's addresses to which the client connects directly."""

EVENT_INTERVAL = 0.02
"""Seconds between the events of a rolling update."""


class Measurements(Struct):
    """Samples by the name of their figure, and what the baselines need to know.

    samples: measured with the daemon running.
    direct: connections on a node without rules.
    """

    samples: dict[str, list[float]]
    direct: dict[str, list[float]]
    kernel: KernelObjects = KernelObjects(0, 0, 0, 0)
    rolling_syncs: int = 1


def unconnected_services(cluster: Cluster) -> list[int]:
    """Return the Services that the client does not connect to, so that their endpoints may change."""
    return [number for number in range(cluster.services) if number not in cluster.connected]


def changed_slices(
    cluster: Cluster, count: int, *, variants: bool = True, annotation: str = ""
) -> list[objects.Object]:
    """Return `count` EndpointSlices of different Services; Services repeat if the cluster has fewer.

    Without `variants`, the slices have their original endpoints.
    """
    numbers = unconnected_services(cluster)
    return [
        cluster.endpoint_slice(numbers[turn % len(numbers)], variant=turn + 1 if variants else 0, annotation=annotation)
        for turn in range(count)
    ]


def measure_daemon(testbed: Testbed, repetitions: Repetitions) -> Measurements:
    """Take all samples, one after the other."""
    result = Measurements(defaultdict(list), defaultdict(list))
    _direct_connections(testbed, repetitions, result)
    for _ in range(repetitions.first_syncs - 1):
        with testbed.daemon() as daemon:
            _first_sync(testbed, daemon, result)
        testbed.flush_rules()
    with testbed.daemon() as daemon:
        _first_sync(testbed, daemon, result)
        result.kernel = testbed.node.call(kernel_objects)
        result.samples["RSS after first sync"].append(daemon.memory[0])
        connections(testbed, repetitions, result)
        if repetitions.endpoint_changes:
            _changes(testbed, daemon, repetitions, result)
            result.samples["RSS after changes"].append(daemon.memory[0])
        result.samples["RSS at peak"].append(daemon.memory[1])
    if repetitions.endpoint_changes:
        with testbed.daemon() as daemon:
            testbed.wait_for_start(daemon, commits=0)
            result.samples["restart: CPU"].append(daemon.cpu)
        assert isinstance(testbed.api_server, BenchApiServer)
        testbed.api_server.set_encoding("JSON")
        with testbed.daemon() as daemon:
            testbed.wait_for_start(daemon, commits=0)
            _annotation_events(testbed, daemon, repetitions, result)
    for name in KernelObjects.__struct_fields__:
        result.samples[f"kernel: {name}"].append(getattr(result.kernel, name))
    return result


def _first_sync(testbed: Testbed, daemon: MeasuredDaemon, result: Measurements) -> None:
    commits = testbed.wait_for_start(daemon)
    seconds = (commits[-1].time - daemon.started) / 1e9
    result.samples["first sync"].append(seconds)
    if testbed.mode == "iptables":
        result.samples["first sync: in blocks"].append(seconds)
    result.samples["first sync: CPU"].append(daemon.cpu)


def _direct_connections(testbed: Testbed, repetitions: Repetitions, result: Measurements) -> None:
    pods = _pods(testbed)
    (rounds,) = measure(testbed.client, [pods], rounds=repetitions.rounds, count=repetitions.connections)
    _add_rounds(result.direct, rounds)
    result.direct["connect past the rules"] = [each.median for each in rounds]
    result.direct["throughput to a VIP"] = _throughput(testbed, repetitions, pods)


def connections(testbed: Testbed, repetitions: Repetitions, result: Measurements) -> None:
    """Measure connections to VIPs, and to pods on a node with rules."""
    vips, pods = testbed.vips, _pods(testbed)
    to_vips, to_pods = measure(testbed.client, [vips, pods], rounds=repetitions.rounds, count=repetitions.connections)
    _add_rounds(result.samples, to_vips)
    result.samples["connect past the rules"] += [each.median for each in to_pods]
    result.samples["throughput to a VIP"] += _throughput(testbed, repetitions, vips)


def _pods(testbed: Testbed) -> list[tuple[str, int]]:
    return [(address, TARGET_PORT) for address in testbed.cluster.server_addresses[:DIRECT_TARGETS]]


def _throughput(testbed: Testbed, repetitions: Repetitions, targets: Sequence[tuple[str, int]]) -> list[float]:
    with testbed.without_server():  # iperf3 listens on the same port, to which the VIPs forward
        return measure_throughput(
            testbed.client,
            testbed.server,
            TARGET_PORT,
            targets,
            count=repetitions.transfers,
            size=repetitions.transfer_bytes,
        )


def _add_rounds(samples: dict[str, list[float]], rounds: list[Round]) -> None:
    samples["connect to a VIP: median"] += [each.median for each in rounds]
    samples["connect to a VIP: p99"] += [each.p99 for each in rounds]
    samples["connections to VIPs"] += [each.rate for each in rounds]


def _changes(testbed: Testbed, daemon: MeasuredDaemon, repetitions: Repetitions, result: Measurements) -> None:
    change_endpoints(testbed, daemon, repetitions.endpoint_changes, result)
    change_services(testbed, daemon, repetitions.service_changes, result)
    for _ in range(repetitions.rolling_updates):
        _rolling_update(testbed, daemon, repetitions.rolling_endpoints, result)
    for _ in range(repetitions.bursts):
        change_many(testbed, daemon, repetitions.burst_changes, result)
    _annotation_events(testbed, daemon, repetitions, result)


def change_endpoints(testbed: Testbed, daemon: MeasuredDaemon, count: int, result: Measurements) -> None:
    """Change one endpoint of a Service, `count` times, and change it back."""
    numbers = unconnected_services(testbed.cluster)
    for turn in range(count):
        number = numbers[turn * len(numbers) // count]
        for variant in (turn + 1, 0):
            effect = testbed.change(daemon, put=[testbed.cluster.endpoint_slice(number, variant=variant)])
            result.samples["one endpoint"].append(effect.seconds)
            result.samples["one endpoint: CPU"].append(effect.cpu)


def change_services(testbed: Testbed, daemon: MeasuredDaemon, count: int, result: Measurements) -> None:
    """Create and delete Services. Their EndpointSlices exist throughout, so each change is one event and one sync."""
    numbers = range(testbed.cluster.services, testbed.cluster.services + count)
    slices = [each for number in numbers for each in testbed.cluster.endpoint_slices(number)]
    testbed.change(daemon, put=slices, commits=0)
    daemon.wait_until_idle(time.monotonic_ns(), commits=0)  # the events of several slices take two syncs
    for number in numbers:
        service = testbed.cluster.service(number)
        for name, effect in (
            ("new Service", testbed.change(daemon, put=[service])),
            ("deleted Service", testbed.change(daemon, delete=[service])),
        ):
            result.samples[name].append(effect.seconds)
            result.samples[f"{name}: CPU"].append(effect.cpu)
    testbed.change(daemon, delete=slices, commits=0)


def _rolling_update(testbed: Testbed, daemon: MeasuredDaemon, endpoints: int, result: Measurements) -> None:
    def replace_all() -> None:
        for step in range(1, endpoints + 1):
            testbed.api_server.change(put=[objects.rolling_slice(endpoints, step)])
            time.sleep(EVENT_INTERVAL)

    initial = [objects.rolling_slice(endpoints, 0), objects.rolling_service()]
    testbed.change(daemon, put=initial)
    effect = testbed.effect(daemon, replace_all)
    result.samples["rolling update"].append(effect.lag)
    result.samples["rolling update: CPU/change"].append(effect.cpu / endpoints)
    result.rolling_syncs = effect.syncs
    testbed.change(daemon, delete=initial)


def change_many(testbed: Testbed, daemon: MeasuredDaemon, count: int, result: Measurements) -> None:
    """Change one endpoint of `count` Services at once, and change them back."""
    for variants in (True, False):
        effect = testbed.change(daemon, put=changed_slices(testbed.cluster, count, variants=variants))
        result.samples["burst"].append(effect.seconds)
        result.samples["burst: CPU/change"].append(effect.cpu / count)
        result.samples["burst: commits"].append(effect.commits)


def _annotation_events(
    testbed: Testbed, daemon: MeasuredDaemon, repetitions: Repetitions, result: Measurements
) -> None:
    """Change only annotations, so that no rule changes, in the encoding that server and daemon negotiated."""
    for turn in range(repetitions.annotation_bursts):
        slices = changed_slices(testbed.cluster, repetitions.burst_changes, variants=False, annotation=f"{turn}")
        effect = testbed.change(daemon, put=slices, commits=0)
        traffic = effect.traffic
        encoding = "protobuf" if traffic.protobuf else "JSON"
        result.samples[f"event, {encoding}: bytes"].append(traffic.bytes / traffic.events)
        result.samples[f"event, {encoding}: CPU"].append(effect.cpu / traffic.events)
