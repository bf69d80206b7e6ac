"""Replace kube-proxy and switch back, with the commands of docs/operations.md, under continuous traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deploy.rendered import ROOT
from tests.deploy.site import IMAGE, make_site
from tests.lab.connection_stream import ConnectionStream
from tests.walk.cluster import NODES, Cluster
from tests.walk.commands import Said, comparable, mentioned, run, section, shown, transcript
from tests.walk.resources import ALL, PODS, Object
from tests.walk.store import key_of

PAGE = ROOT / "docs/operations.md"
PLACE, BACK = section(PAGE, "## Replace kube-proxy"), section(PAGE, "### Switch back to kube-proxy")
README = transcript(section(ROOT / "README.md", "## Install on a cluster"))
KUBE_PROXY, KPROXY = "registry.k8s.io/kube-proxy:v1.36.0", IMAGE


class State(NamedTuple):
    """What runs on each node, what the nodes' kernels hold, and who answered since the last command."""

    running: dict[str, list[str]]
    rules: list[str]
    answered: set[str]


class Walk:
    """The way there and back. `states` has how things were before the first command and after each."""

    def __init__(self, cluster: Cluster, checkout: Path, home: Path) -> None:
        """`checkout` has what the commands need of the repository, with `deploy/site` made as the page says."""
        self.cluster, self._checkout, self._home = cluster, checkout, home
        self.said: list[Said] = []
        self.looks: list[str] = []
        self.states: list[State] = []
        self.before = self._objects()

    def go(self) -> None:
        """Run all the commands; in between, the Service gets a third pod, and loses it in the end."""
        self.cluster.set_endpoints(2)
        configuration, log = mentioned(PLACE)[:2]
        with ConnectionStream(self.cluster.targets()) as stream:
            self._look_around(stream)
            self.looks.append(self._run(configuration).output)
            self._follow(transcript(PLACE), stream)
            self.looks.append(self._run(log).output)
            self.cluster.set_endpoints(3)
            self._follow(transcript(BACK), stream)
            self.cluster.set_endpoints(2)
            stream.settle()
            self.complaints = stream.failure_report()
        self.after = self._objects()

    def _follow(self, commands: list[Said], stream: ConnectionStream) -> None:
        for each in commands:
            stream.mark(each.command)
            self.said.append(self._run(each.command))
            self._look_around(stream)

    def _run(self, command: str) -> Said:
        return run(command, self._checkout, self.cluster.kubeconfig(), self._home)

    def _look_around(self, stream: ConnectionStream) -> None:
        running = {each.node: each.running() for each in self.cluster.kubelets}
        self.states.append(State(running, self.cluster.rules(), set(stream.take(3))))

    def _objects(self) -> dict[tuple[str, str], Object]:
        """Return all objects but Pods and events, without what every change and every status leaves."""
        found = {}
        for resource in ALL:
            for each in self.cluster.server.store.all(resource):
                if resource is not PODS and each["kind"] not in {"Event", "EndpointSlice"}:
                    metadata = {k: v for k, v in each["metadata"].items() if k not in {"generation", "resourceVersion"}}
                    found[each["kind"], key_of(each)] = each | {"metadata": metadata, "status": None}
        return found

    def after_command(self, text: str) -> State:
        """Return how things were after the only command that has this in it."""
        (number,) = (number for number, each in enumerate(self.said, 1) if text in each.command)
        return self.states[number]


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def walk(machine: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    checkout = tmp_path_factory.mktemp("checkout")
    make_site(checkout, PAGE)
    with Cluster(tmp_path_factory.mktemp("cluster"), request.param) as cluster:
        walk = Walk(cluster, checkout, tmp_path_factory.mktemp("home"))
        try:
            walk.go()
        except Exception as error:
            error.add_note(cluster.log())
            raise
        yield walk


def test_both_sections_have_commands() -> None:
    assert [len(transcript(each)) for each in (PLACE, BACK)] == [4, 4]


def test_nobody_notices(walk: Walk) -> None:
    assert walk.complaints == ""


def test_requests_are_answered_all_the_time(walk: Walk) -> None:
    assert [state.answered for state in walk.states if not state.answered >= {"web/1", "web/2"}] == []
    assert walk.after_command("delete -k").answered == {"web/1", "web/2", "web/3"}


def test_never_two_on_a_node(walk: Walk) -> None:
    turns = [f"{sign} {image}" for image in (KUBE_PROXY, KPROXY) for sign in "+-"]
    assert [each.history for each in walk.cluster.kubelets] == [[*turns, f"+ {KUBE_PROXY}"]] * 2


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("wait --for=delete pod -l k8s-app=kube-proxy", []),
        ("rollout status daemonset/kproxy", [KPROXY]),
        ("wait --for=delete pod -l app.kubernetes.io/name=kproxy", []),
        ("rollout status daemonset/kube-proxy", [KUBE_PROXY]),
    ],
)
def test_what_runs_on_each_node_after(walk: Walk, command: str, runs: list[str]) -> None:
    assert walk.after_command(command).running == dict.fromkeys(NODES, runs)


def test_rules_stay_while_nobody_is_there(walk: Walk) -> None:
    first = walk.after_command("wait --for=delete pod -l k8s-app=kube-proxy")
    second = walk.after_command("wait --for=delete pod -l app.kubernetes.io/name=kproxy")
    assert first.rules == walk.states[0].rules
    assert second.rules == walk.after_command("delete -k").rules
    assert all("10.244.2.2" in rules and "10.244.1.3" not in rules for rules in first.rules)
    assert all("10.244.2.2" in rules and "10.244.1.3" in rules for rules in second.rules)


def test_in_the_end_everything_is_as_before(walk: Walk) -> None:
    assert ("DaemonSet", "kube-system/kube-proxy") in walk.before
    assert walk.after == walk.before


def test_nobody_asks_for_more_than_the_roles_allow(walk: Walk) -> None:
    assert walk.cluster.server.forbidden == []


def test_the_page_shows_how_to_look_at_configuration_and_log(walk: Walk) -> None:
    configuration, log = walk.looks
    stored = walk.before["ConfigMap", "kube-system/kube-proxy"]["data"]
    assert configuration == stored["config.conf"]
    assert ": synced " in log


def test_the_page_shows_what_the_commands_print(walk: Walk) -> None:
    expected = transcript(PLACE) + transcript(BACK)
    assert comparable(expected) == comparable(walk.said), f"docs/operations.md should show:\n{shown(walk.said)}"


def test_the_readme_has_the_same_commands() -> None:
    assert [each.command for each in README] == [each.command for each in transcript(PLACE) + transcript(BACK)]
