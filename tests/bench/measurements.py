"""What the daemon costs: samples of every figure for one mode and size of cluster."""

from __future__ import annotations

import time
from collections import defaultdict

from msgspec import Struct

from tests.bench import cluster as objects
from tests.bench.cluster import PORT, TARGET_PORT, Cluster, cluster_ip
from tests.bench.connections import Round, measure
from tests.bench.daemon import Subject
from tests.bench.kernel_objects import KernelObjects, kernel_objects
from tests.bench.sizes import Effort
from tests.bench.testbed import SERVED, Scene

PACE = 0.02
"""Seconds between the events of a rolling update."""


class Measured(Struct):
    """Samples by the name of their figure, those of connections without rules, and what the floors need to know."""

    found: dict[str, list[float]]
    direct: dict[str, list[float]]
    kernel: KernelObjects = KernelObjects(0, 0, 0, 0)
    rolling_syncs: int = 1


def spare(cluster: Cluster) -> list[int]:
    """Return the Services whose endpoints may change: those that nobody connects to."""
    return [number for number in range(cluster.services) if number not in cluster.reached]


def changed_slices(cluster: Cluster, count: int, *, shifted: bool = True, note: str = "") -> list[objects.Object]:
    """Return one slice of each of `count` Services, or several of the same if there are not so many."""
    numbers = spare(cluster)
    return [
        cluster.endpoint_slice(numbers[turn % len(numbers)], shift=turn + 1 if shifted else 0, note=note)
        for turn in range(count)
    ]


def take_all(scene: Scene, effort: Effort) -> Measured:
    """Measure everything, one thing after the other."""
    done = Measured(defaultdict(list), defaultdict(list))
    _direct(scene, effort, done)
    for _ in range(effort.first_syncs - 1):
        with scene.subject() as subject:
            _first_sync(scene, subject, done)
        scene.empty()
    with scene.subject() as subject:
        _first_sync(scene, subject, done)
        done.kernel = scene.node.call(kernel_objects)
        done.found["RSS after first sync"].append(subject.memory[0])
        _connects(scene, effort, done)
        if effort.changes:
            _changes(scene, subject, effort, done)
            done.found["RSS after changes"].append(subject.memory[0])
        done.found["RSS at peak"].append(subject.memory[1])
    if effort.changes:
        with scene.subject() as subject:
            scene.settle_start(subject, commits=0)
            done.found["restart: CPU"].append(subject.cpu)
        scene.feed.speak("JSON")
        with scene.subject() as subject:
            scene.settle_start(subject, commits=0)
            _idle_events(scene, subject, effort, done)
    for name in KernelObjects.__struct_fields__:
        done.found[f"kernel: {name}"].append(getattr(done.kernel, name))
    return done


def _first_sync(scene: Scene, subject: Subject, done: Measured) -> None:
    notices = scene.settle_start(subject)
    seconds = (notices[-1].moment - subject.started) / 1e9
    done.found["first sync"].append(seconds)
    if scene.mode == "iptables":
        done.found["first sync: in blocks"].append(seconds)
    done.found["first sync: CPU"].append(subject.cpu)


def _direct(scene: Scene, effort: Effort, done: Measured) -> None:
    pods = [(address, TARGET_PORT) for address in SERVED]
    (rounds,) = measure(scene.client, [pods], rounds=effort.rounds, count=effort.connects)
    _note_rounds(done.direct, rounds)
    done.direct["connect past the rules"] = [each.median for each in rounds]


def _connects(scene: Scene, effort: Effort, done: Measured) -> None:
    vips = [(cluster_ip(number), PORT) for number in scene.cluster.reached]
    pods = [(address, TARGET_PORT) for address in SERVED]
    through, past = measure(scene.client, [vips, pods], rounds=effort.rounds, count=effort.connects)
    _note_rounds(done.found, through)
    done.found["connect past the rules"] += [each.median for each in past]


def _note_rounds(samples: dict[str, list[float]], rounds: list[Round]) -> None:
    samples["connect to a VIP: median"] += [each.median for each in rounds]
    samples["connect to a VIP: p99"] += [each.p99 for each in rounds]
    samples["connections to VIPs"] += [each.rate for each in rounds]


def _changes(scene: Scene, subject: Subject, effort: Effort, done: Measured) -> None:
    _endpoints(scene, subject, effort.changes, done)
    _services(scene, subject, effort.services, done)
    for _ in range(effort.rollings):
        _rolling(scene, subject, effort.rolled, done)
    for _ in range(effort.bursts):
        _burst(scene, subject, effort.burst, done)
    _idle_events(scene, subject, effort, done)


def _endpoints(scene: Scene, subject: Subject, count: int, done: Measured) -> None:
    numbers = spare(scene.cluster)
    for turn in range(count):
        number = numbers[turn * len(numbers) // count]
        for shift in (turn + 1, 0):
            effect = scene.change(subject, put=[scene.cluster.endpoint_slice(number, shift=shift)])
            done.found["one endpoint"].append(effect.seconds)
            done.found["one endpoint: CPU"].append(effect.cpu)


def _services(scene: Scene, subject: Subject, count: int, done: Measured) -> None:
    """Let Services come and go whose slices are there all the time: so each is one event, and one sync."""
    numbers = range(scene.cluster.services, scene.cluster.services + count)
    slices = [scene.cluster.endpoint_slice(number) for number in numbers]
    scene.change(subject, put=slices, commits=0)
    for number in numbers:
        service = scene.cluster.service(number)
        for name, effect in (
            ("new Service", scene.change(subject, put=[service])),
            ("deleted Service", scene.change(subject, delete=[service])),
        ):
            done.found[name].append(effect.seconds)
            done.found[f"{name}: CPU"].append(effect.cpu)
    scene.change(subject, delete=slices, commits=0)


def _rolling(scene: Scene, subject: Subject, endpoints: int, done: Measured) -> None:
    def replace_all() -> None:
        for step in range(1, endpoints + 1):
            scene.feed.change(put=[objects.rolling_slice(endpoints, step)])
            time.sleep(PACE)

    there = [objects.rolling_slice(endpoints, 0), objects.rolling_service()]
    scene.change(subject, put=there)
    effect = scene.effect(subject, replace_all)
    done.found["rolling update"].append(effect.lag)
    done.found["rolling update: CPU/change"].append(effect.cpu / endpoints)
    done.rolling_syncs = effect.syncs
    scene.change(subject, delete=there)


def _burst(scene: Scene, subject: Subject, count: int, done: Measured) -> None:
    for shifted in (True, False):
        effect = scene.change(subject, put=changed_slices(scene.cluster, count, shifted=shifted))
        done.found["burst"].append(effect.seconds)
        done.found["burst: CPU/change"].append(effect.cpu / count)
        done.found["burst: commits"].append(effect.commits)


def _idle_events(scene: Scene, subject: Subject, effort: Effort, done: Measured) -> None:
    """Let the server send events in which rules have no part, in the form that server and daemon have agreed on."""
    for turn in range(effort.idles):
        slices = changed_slices(scene.cluster, effort.burst, shifted=False, note=f"{turn}")
        effect = scene.change(subject, put=slices, commits=0)
        written = effect.written
        form = "protobuf" if written.protobuf else "JSON"
        done.found[f"event, {form}: bytes"].append(written.bytes / written.events)
        done.found[f"event, {form}: CPU"].append(effect.cpu / written.events)
