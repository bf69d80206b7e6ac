"""The steps of the demo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tests.demo.cluster import PORT, SERVICE, TARGET_PORT, VIP, DemoCluster
from tests.demo.rules import rules_of
from tests.demo.screen import Screen, is_balanced
from tests.lab.client import Outcome
from tests.lab.continuous_requests import ContinuousRequests, failures
from tests.lab.topology import Host

REQUESTS = 300


def run(cluster: DemoCluster, screen: Screen) -> bool:
    """Run all steps; return whether no request failed and the right pods shared the traffic equally."""
    screen.heading("kproxy demo: a small cluster in network namespaces. It does not change your machine.")
    pods = _create_pods(cluster, screen)
    _start_kproxy(cluster, screen, pods)
    with ContinuousRequests(cluster.request) as flow:
        passed = _show_balance(screen, flow, pods)
        passed &= _remove_pod(cluster, screen, flow, pods)
        passed &= _add_pod(cluster, screen, flow, pods)
    passed &= _show_failures(screen, flow.outcomes)
    _show_rules(cluster, screen, pods)
    _show_next_steps(screen)
    return passed


def _create_pods(cluster: DemoCluster, screen: Screen) -> list[Host]:
    screen.step("Create a node, three pods and a client, each in its own network namespace.")
    pods = [cluster.add_pod(f"web-{letter}", f"10.244.1.{n}") for n, letter in enumerate("abc", start=1)]
    for host in (cluster.node, *pods, cluster.client):
        role = f"HTTP server on port {TARGET_PORT}, replies with its name" if host in pods else ""
        screen.line(f"{host.name:8}{host.address():14}{role}".rstrip())
    return pods


def _start_kproxy(cluster: DemoCluster, screen: Screen, pods: Sequence[Host]) -> None:
    screen.step("Create a Service and its EndpointSlice, as YAML files in place of an API server.")
    cluster.write_service()
    cluster.write_endpoints(pods)
    screen.line(f"{SERVICE} {VIP}:{PORT} -> {', '.join(pod.name for pod in pods)}, port {TARGET_PORT}")
    screen.step("Start kproxy on the node. It programs iptables rules for the Service.")
    daemon, seconds = cluster.start_kproxy()
    screen.line(f"$ {daemon.command}", "cyan")
    screen.line(f"http://{VIP}/ is reachable {seconds:.2f} s after the start.")


def _show_balance(screen: Screen, flow: ContinuousRequests, pods: Sequence[Host]) -> bool:
    screen.step(f"Send {REQUESTS} requests to http://{VIP}/, each over a new connection.")
    return _check_balance(screen, flow.take(REQUESTS), pods, "each pod received about a third of the requests.")


def _remove_pod(cluster: DemoCluster, screen: Screen, flow: ContinuousRequests, pods: list[Host]) -> bool:
    removed = pods.pop(0)
    screen.step(f"Terminate {removed.name} while requests continue.")
    seconds = cluster.time_until_programmed(
        lambda: cluster.write_endpoints(pods, terminating=[removed]), removed, present=False
    )
    screen.line(f"kproxy removed it from the rules {seconds:.2f} s after the endpoint was marked as terminating.")
    flow.settle()
    cluster.stop_pod(removed)
    cluster.write_endpoints(pods)
    screen.line("The pod replied to its accepted requests and stopped.")
    return _check_balance(screen, flow.take(REQUESTS), pods, "the other two pods share the requests.", former=[removed])


def _add_pod(cluster: DemoCluster, screen: Screen, flow: ContinuousRequests, pods: list[Host]) -> bool:
    added = cluster.add_pod("web-d", "10.244.1.4")
    pods.append(added)
    screen.step(f"Add {added.name} while requests continue.")
    seconds = cluster.time_until_programmed(lambda: cluster.write_endpoints(pods), added, present=True)
    screen.line(f"kproxy added it to the rules {seconds:.2f} s after the endpoint was added to the file.")
    flow.settle()
    return _check_balance(screen, flow.take(REQUESTS), pods, "the new pod received its share of the requests.")


def _check_balance(
    screen: Screen, counts: Counter[str], pods: Sequence[Host], expected: str, former: Sequence[Host] = ()
) -> bool:
    names = [pod.name for pod in pods]
    screen.bars(counts, [*(pod.name for pod in former), *names])
    passed = is_balanced(counts, names)
    screen.result(passed, expected if passed else f"expected equal shares for {', '.join(names)}")
    return passed


def _show_failures(screen: Screen, outcomes: list[Outcome]) -> bool:
    failed = failures(outcomes)
    screen.step("Count the failed requests.")
    screen.result(not failed, f"{len(outcomes)} requests, {len(failed)} failed.")
    for outcome, count in Counter(failed).most_common(3):
        screen.line(f"{count} x {outcome}", "red")
    return not failed


def _show_rules(cluster: DemoCluster, screen: Screen, pods: Sequence[Host]) -> None:
    screen.step(f"Show the rules of {SERVICE} on the node, from `iptables-save -t nat`.")
    screen.rules(rules_of(cluster.dump(), SERVICE))
    screen.line("")
    screen.line(f"KUBE-SERVICES matches {VIP}. The KUBE-SVC chain picks one of the {len(pods)} pods at random,")
    screen.line("and the KUBE-SEP chain of the pod rewrites the destination address (DNAT).")


def _show_next_steps(screen: Screen) -> None:
    screen.step("Next steps:")
    screen.line(".venv/bin/kproxy render --objects=PATH   print the rules for your own YAML files")
    screen.line(".venv/bin/kproxy --help                  list all commands")
    screen.line("README.md                                how to run kproxy in a cluster")
