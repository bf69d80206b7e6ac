"""Replace kube-proxy and switch back, with the commands in docs/operations.md, under continuous traffic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deploy.rendered import ROOT
from tests.deploy.site_kustomization import IMAGE, make_site
from tests.lab.connection_stream import ConnectionStream
from tests.migration.cluster import NODES, Cluster
from tests.migration.commands import (
    CommandOutput,
    comparable,
    console_block,
    inline_commands,
    run,
    section,
    transcript,
)
from tests.migration.resources import ALL, PODS, Object
from tests.migration.store import key_of

PAGE = ROOT / "docs/operations.md"
REPLACE, RESTORE = section(PAGE, "## Replace kube-proxy"), section(PAGE, "### Switch back to kube-proxy")
README = transcript(section(ROOT / "README.md", "## Install on a cluster"))
KUBE_PROXY, KPROXY = "registry.k8s.io/kube-proxy:v1.36.0", IMAGE


class State(NamedTuple):
    """The running images by node, the rule set of each node, and the pods that replied since the last command."""

    running: dict[str, list[str]]
    rules: list[str]
    replied: set[str]


class Migration:
    """Runs the commands. `states` has the state before the first command and after each command."""

    def __init__(self, cluster: Cluster, checkout: Path, home: Path) -> None:
        """`checkout` contains the files that the commands need, with `deploy/site` as documented."""
        self.cluster, self._checkout, self._home = cluster, checkout, home
        self.outputs: list[CommandOutput] = []
        self.inspections: list[str] = []
        self.states: list[State] = []
        self.before = self._objects()

    def run(self) -> None:
        """Run all commands. The Service gets a third pod in between and loses it at the end."""
        self.cluster.set_endpoints(2)
        configuration, log = inline_commands(REPLACE)[:2]
        with ConnectionStream(self.cluster.targets()) as stream:
            self._record_state(stream)
            self.inspections.append(self._command(configuration).output)
            self._commands(transcript(REPLACE), stream)
            self.inspections.append(self._command(log).output)
            self.cluster.set_endpoints(3)
            self._commands(transcript(RESTORE), stream)
            self.cluster.set_endpoints(2)
            stream.settle()
            self.failed_requests = stream.failure_report()
        self.after = self._objects()

    def _commands(self, commands: list[CommandOutput], stream: ConnectionStream) -> None:
        for each in commands:
            stream.mark(each.command)
            self.outputs.append(self._command(each.command))
            self._record_state(stream)

    def _command(self, command: str) -> CommandOutput:
        return run(command, self._checkout, self.cluster.kubeconfig(), self._home)

    def _record_state(self, stream: ConnectionStream) -> None:
        running = {each.node: each.running() for each in self.cluster.kubelets}
        self.states.append(State(running, self.cluster.rules(), set(stream.take(3))))

    def _objects(self) -> dict[tuple[str, str], Object]:
        """Return all objects except Pods, Events and EndpointSlices, without generation, resourceVersion and status."""
        objects = {}
        for resource in ALL:
            for each in self.cluster.server.store.all(resource):
                if resource is not PODS and each["kind"] not in {"Event", "EndpointSlice"}:
                    metadata = {k: v for k, v in each["metadata"].items() if k not in {"generation", "resourceVersion"}}
                    objects[each["kind"], key_of(each)] = each | {"metadata": metadata, "status": None}
        return objects

    def after_command(self, text: str) -> State:
        """Return the state after the only command that contains a text."""
        (number,) = (number for number, each in enumerate(self.outputs, 1) if text in each.command)
        return self.states[number]


@pytest.fixture(scope="module", params=["iptables", "nftables"])
def migration(
    machine: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Migration]:
    checkout = tmp_path_factory.mktemp("checkout")
    make_site(checkout, PAGE)
    with Cluster(tmp_path_factory.mktemp("cluster"), request.param) as cluster:
        migration = Migration(cluster, checkout, tmp_path_factory.mktemp("home"))
        try:
            migration.run()
        except Exception as error:
            error.add_note(cluster.log())
            raise
        yield migration


def test_both_sections_have_four_commands() -> None:
    assert [len(transcript(each)) for each in (REPLACE, RESTORE)] == [4, 4]


def test_no_request_fails(migration: Migration) -> None:
    assert migration.failed_requests == ""


def test_all_pods_of_the_service_reply_throughout(migration: Migration) -> None:
    assert [state.replied for state in migration.states if not state.replied >= {"web/1", "web/2"}] == []
    assert migration.after_command("delete -k").replied == {"web/1", "web/2", "web/3"}


def test_proxies_never_run_simultaneously_on_a_node(migration: Migration) -> None:
    turns = [f"{sign} {image}" for image in (KUBE_PROXY, KPROXY) for sign in "+-"]
    assert [each.history for each in migration.cluster.kubelets] == [[*turns, f"+ {KUBE_PROXY}"]] * 2


@pytest.mark.parametrize(
    ("command", "running"),
    [
        ("wait --for=delete pod -l k8s-app=kube-proxy", []),
        ("rollout status daemonset/kproxy", [KPROXY]),
        ("wait --for=delete pod -l app.kubernetes.io/name=kproxy", []),
        ("rollout status daemonset/kube-proxy", [KUBE_PROXY]),
    ],
)
def test_images_on_each_node_after_a_command(migration: Migration, command: str, running: list[str]) -> None:
    assert migration.after_command(command).running == dict.fromkeys(NODES, running)


def test_rules_stay_active_while_no_proxy_runs(migration: Migration) -> None:
    first = migration.after_command("wait --for=delete pod -l k8s-app=kube-proxy")
    second = migration.after_command("wait --for=delete pod -l app.kubernetes.io/name=kproxy")
    assert first.rules == migration.states[0].rules
    assert second.rules == migration.after_command("delete -k").rules
    assert all("10.244.2.2" in rules and "10.244.1.3" not in rules for rules in first.rules)
    assert all("10.244.2.2" in rules and "10.244.1.3" in rules for rules in second.rules)


def test_switching_back_restores_all_objects(migration: Migration) -> None:
    assert ("DaemonSet", "kube-system/kube-proxy") in migration.before
    assert migration.after == migration.before


def test_no_request_exceeds_the_cluster_roles(migration: Migration) -> None:
    assert migration.cluster.server.forbidden == []


def test_documented_commands_show_configuration_and_log(migration: Migration) -> None:
    configuration, log = migration.inspections
    stored = migration.before["ConfigMap", "kube-system/kube-proxy"]["data"]
    assert configuration == stored["config.conf"]
    assert ": synced " in log


def test_documented_output_is_that_of_the_commands(migration: Migration) -> None:
    documented = transcript(REPLACE) + transcript(RESTORE)
    actual = migration.outputs
    assert comparable(documented) == comparable(actual), f"docs/operations.md should show:\n{console_block(actual)}"


def test_readme_has_the_same_commands() -> None:
    assert [each.command for each in README] == [each.command for each in transcript(REPLACE) + transcript(RESTORE)]
