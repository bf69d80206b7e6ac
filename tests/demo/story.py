"""What the demo tells, step by step. It ends with whether everything came as it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.demo.picture import Screen, as_expected
from tests.demo.rules import rules_of
from tests.demo.scene import PORT, SERVICE, TARGET_PORT, VIP, Scene
from tests.lab.client import Outcome
from tests.lab.continuous_requests import ContinuousRequests, failures
from tests.lab.topology import Host

REQUESTS = 300


def tell(scene: Scene, screen: Screen) -> bool:
    """Play the whole story; return whether every request was answered by the right pods, fairly."""
    screen.heading("kproxy demo: a small cluster in network namespaces. Nothing of it touches your machine.")
    pods = _build(scene, screen)
    _start(scene, screen, pods)
    with ContinuousRequests(scene.request) as flow:
        good = _show_spread(screen, flow, pods)
        good &= _take_pod_away(scene, screen, flow, pods)
        good &= _add_pod(scene, screen, flow, pods)
    good &= _count(screen, flow.outcomes)
    _show_rules(scene, screen, pods)
    _say_what_next(screen)
    return good


def _build(scene: Scene, screen: Screen) -> list[Host]:
    screen.step("A node, three pods and a client, each in a network namespace of its own.")
    pods = [scene.add_pod(f"web-{letter}", f"10.244.1.{n}") for n, letter in enumerate("abc", start=1)]
    for host in (scene.node, *pods, scene.client):
        role = f"HTTP server on port {TARGET_PORT}, answers with its name" if host in pods else ""
        screen.say(f"{host.name:8}{host.address():14}{role}".rstrip())
    return pods


def _start(scene: Scene, screen: Screen, pods: Sequence[Host]) -> None:
    screen.step("A Service and its endpoints, as YAML files that stand in for the API server.")
    scene.write_service()
    scene.write_endpoints(pods)
    screen.say(f"{SERVICE} {VIP}:{PORT} -> {', '.join(pod.name for pod in pods)}, port {TARGET_PORT}")
    screen.step("The real daemon on the node turns them into iptables rules.")
    daemon, seconds = scene.start_kproxy()
    screen.say(f"$ {daemon.command}", "cyan")
    screen.say(f"http://{VIP}/ answers {seconds:.2f} s after the start.")


def _show_spread(screen: Screen, flow: ContinuousRequests, pods: Sequence[Host]) -> bool:
    screen.step(f"{REQUESTS} requests to http://{VIP}/, each over a connection of its own. Who answers?")
    return _draw(screen, flow.take(REQUESTS), pods, "each pod got about a third.")


def _take_pod_away(scene: Scene, screen: Screen, flow: ContinuousRequests, pods: list[Host]) -> bool:
    leaving = pods.pop(0)
    screen.step(f"{leaving.name} shuts down while requests keep flowing.")
    seconds = scene.follow(lambda: scene.write_endpoints(pods, leaving=[leaving]), leaving, present=False)
    screen.say(f"Marked as terminating: no rule sends to it any more {seconds:.2f} s later.")
    flow.settle()
    scene.stop_pod(leaving)
    scene.write_endpoints(pods)
    screen.say("It answered what it had accepted, then it stopped listening.")
    return _draw(screen, flow.take(REQUESTS), pods, "the other two share the traffic.", gone=[leaving])


def _add_pod(scene: Scene, screen: Screen, flow: ContinuousRequests, pods: list[Host]) -> bool:
    joining = scene.add_pod("web-d", "10.244.1.4")
    pods.append(joining)
    screen.step(f"{joining.name} joins.")
    seconds = scene.follow(lambda: scene.write_endpoints(pods), joining, present=True)
    screen.say(f"A rule sends to it {seconds:.2f} s after it is in the file.")
    flow.settle()
    return _draw(screen, flow.take(REQUESTS), pods, "the new pod has its share.")


def _draw(screen: Screen, counts: Counter[str], pods: Sequence[Host], wish: str, gone: Sequence[Host] = ()) -> bool:
    names = [pod.name for pod in pods]
    screen.bars(counts, [*(pod.name for pod in gone), *names])
    good = as_expected(counts, names)
    screen.verdict(good, wish if good else f"expected {', '.join(names)} to answer equally often")
    return good


def _count(screen: Screen, outcomes: list[Outcome]) -> bool:
    failed = failures(outcomes)
    screen.step("Did anybody notice?")
    screen.verdict(not failed, f"{len(outcomes)} requests, {len(failed)} failed.")
    for outcome, count in Counter(failed).most_common(3):
        screen.say(f"{count} x {outcome}", "red")
    return not failed


def _show_rules(scene: Scene, screen: Screen, pods: Sequence[Host]) -> None:
    screen.step(f"The rules of {SERVICE} in the node's kernel, from `iptables-save -t nat`:")
    screen.rules(rules_of(scene.dump(), SERVICE))
    screen.say("")
    screen.say(f"KUBE-SERVICES knows {VIP}, KUBE-SVC throws the die, each KUBE-SEP is a pod ({len(pods)}).")


def _say_what_next(screen: Screen) -> None:
    screen.step("What next?")
    screen.say("kproxy render --objects FOLDER    print the rules for your own YAML files; changes nothing")
    screen.say("kproxy --help                     all commands; the flags are kube-proxy's")
    screen.say("README.md                         how to run it in a cluster, and how it works")
