"""The stand-in for the cluster is as strict as a real cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.apiserver.resources import ENDPOINT_SLICES, SERVICES
from tests.deploy.rendered import schemas
from tests.deploy.tls import server_tls
from tests.migration import cluster, rbac
from tests.migration.commands import CommandOutput, comparable, inline_commands, run, transcript
from tests.migration.controllers import new_pod, should_run_on, status
from tests.migration.resources import CONFIG_MAPS, DAEMON_SETS, SERVICE_ACCOUNTS, Object, RequestTarget
from tests.migration.server import VERSION, ControlPlane

OBJECTS = list(yaml.safe_load_all(Path(cluster.__file__).with_name("kube-proxy.yaml").read_text()))
NODE_1, NODE_2 = (cluster.node(name, ("192.0.2.1",), control_plane=name == "node-1") for name in cluster.NODES)


@pytest.fixture
def server(machine: None, tmp_path: Path) -> Iterator[ControlPlane]:
    server = ControlPlane(server_tls(tmp_path, "127.0.0.1"), logs=tmp_path)
    for each in OBJECTS:
        server.create(each)
    with server:
        yield server


@pytest.fixture
def kubectl(server: ControlPlane, tmp_path: Path) -> Callable[[str], str]:
    config = server.kubeconfig(tmp_path / "config", token=rbac.ADMIN)
    return lambda words: run(f"kubectl -n kube-system {words}", tmp_path, config, tmp_path).output


@pytest.mark.parametrize("body", [*OBJECTS, NODE_1], ids=lambda body: str(body["kind"]))
def test_objects_are_valid(body: Object) -> None:
    schemas().validate(body, VERSION, strict=True)


def test_object_with_an_unknown_field_is_rejected(kubectl: Callable[[str], str], tmp_path: Path) -> None:
    wrong = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "dato": {}}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(RuntimeError, match="dato"):
        kubectl(f"apply -f {tmp_path / 'wrong.json'}")


def test_patch_of_a_missing_field_is_rejected(kubectl: Callable[[str], str]) -> None:
    with pytest.raises(RuntimeError, match="nothing"):
        kubectl("""patch daemonset kube-proxy --type=json -p '[{"op": "remove", "path": "/spec/nothing"}]'""")


def test_generation_increases_with_changes_of_the_specification(
    server: ControlPlane, kubectl: Callable[[str], str]
) -> None:
    for number, patch in ((1, {"metadata": {"labels": {"a": "b"}}}), (2, {"spec": {"minReadySeconds": 1}})):
        kubectl(f"patch daemonset kube-proxy --type=merge -p '{json.dumps(patch)}'")
        assert server.store.get(DAEMON_SETS, "kube-system/kube-proxy")["metadata"]["generation"] == number


def test_service_account_has_the_permissions_of_its_role(server: ControlPlane, kubectl: Callable[[str], str]) -> None:
    (account,) = server.store.all(SERVICE_ACCOUNTS)
    token = rbac.token_of(account)
    user = rbac.user_of(server.store, token)
    assert user == "system:serviceaccount:kube-system:kube-proxy"
    requests = [(SERVICES, "list"), (ENDPOINT_SLICES, "watch"), (SERVICES, "delete"), (CONFIG_MAPS, "list")]

    def permitted() -> list[bool]:
        return [rbac.allowed(server.store, user, verb, RequestTarget(each, "", "", "")) for each, verb in requests]

    assert permitted() == [True, True, False, False]
    kubectl("delete clusterrole system:node-proxier")
    assert not any(permitted())
    kubectl("delete serviceaccount kube-proxy")
    assert rbac.user_of(server.store, token) == ""
    assert rbac.user_of(server.store, rbac.ADMIN) == rbac.ADMIN


@pytest.mark.parametrize(
    ("spec", "nodes"),
    [
        ({}, [NODE_2]),
        ({"tolerations": [{"operator": "Exists"}]}, [NODE_1, NODE_2]),
        ({"tolerations": [{"operator": "Exists", "key": "other"}]}, [NODE_2]),
        ({"nodeSelector": {"kubernetes.io/os": "linux"}}, [NODE_2]),
        ({"nodeSelector": {"kproxy/replaced": "true"}}, []),
    ],
)
def test_nodes_that_a_daemon_set_runs_on(spec: Object, nodes: list[Object]) -> None:
    assert [node for node in (NODE_1, NODE_2) if should_run_on(spec, node)] == nodes


def test_status_counts_ready_and_updated_pods() -> None:
    (body,) = (each for each in OBJECTS if each["kind"] == "DaemonSet")
    owner = body | {"metadata": body["metadata"] | {"uid": "u", "generation": 7}}
    pod = new_pod(owner, "node-1") | {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    ready = status(owner, 2, [pod])
    assert [ready[f"number{name}"] for name in ("Ready", "Available", "Unavailable")] == [1, 1, 1]
    changed = owner | {"spec": owner["spec"] | {"template": {"spec": {}}}}
    assert [status(each, 2, [pod])["updatedNumberScheduled"] for each in (owner, changed)] == [1, 0]


def test_commands_on_a_page_are_parsed() -> None:
    text = "See `kubectl get x`:\n```console\n$ a \\\n    -b\none\ntwo\n$ c\n```\nand\n```console\n$ d\n```\n"
    assert transcript(text) == [
        CommandOutput("a \\\n    -b", "one\ntwo\n"),
        CommandOutput("c", ""),
        CommandOutput("d", ""),
    ]
    assert inline_commands(text) == ["kubectl get x"]


def test_only_varying_output_is_ignored_in_comparisons() -> None:
    output = 'pod/kube-proxy-1a2b3 condition met\nWaiting for daemon set "kproxy" rollout to finish: 0 of 2\n'
    output += 'daemonset.apps "kproxy" deleted from kube-system namespace\ndone\n'
    expected = 'pod/kube-proxy-* condition met\ndaemonset.apps "kproxy" deleted\ndone'
    assert comparable([CommandOutput("a", output)]) == [CommandOutput("a", expected)]
