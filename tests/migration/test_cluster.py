"""The stand-in is as strict as what it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.apiserver.resources import ENDPOINT_SLICES, SERVICES
from tests.migration import cluster, rbac
from tests.migration.commands import Said, comparable, mentioned, run, transcript
from tests.migration.controllers import fits, new_pod, status
from tests.migration.resources import CONFIG_MAPS, DAEMON_SETS, SERVICE_ACCOUNTS, Object, Place
from tests.migration.server import VERSION, ControlPlane

OBJECTS = list(yaml.safe_load_all(Path(cluster.__file__).with_name("kube-proxy.yaml").read_text()))
NODE_1, NODE_2 = (cluster.node(name, ("192.0.2.1",), control_plane=name == "node-1") for name in cluster.NODES)


@pytest.fixture
def server(machine: None, tmp_path: Path) -> Iterator[ControlPlane]:
    server = ControlPlane(cluster.tls(tmp_path), logs=tmp_path)
    for each in OBJECTS:
        server.create(each)
    with server:
        yield server


@pytest.fixture
def kubectl(server: ControlPlane, tmp_path: Path) -> Callable[[str], str]:
    config = server.kubeconfig(tmp_path / "config", token=rbac.ADMIN)
    return lambda words: run(f"kubectl -n kube-system {words}", tmp_path, config, tmp_path).output


@pytest.mark.parametrize("body", [*OBJECTS, NODE_1], ids=lambda body: str(body["kind"]))
def test_objects_are_what_the_api_takes(body: Object) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    schemas.validate(body, VERSION, strict=True)


def test_a_field_that_does_not_exist_is_refused(kubectl: Callable[[str], str], tmp_path: Path) -> None:
    wrong = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "dato": {}}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(RuntimeError, match="dato"):
        kubectl(f"apply -f {tmp_path / 'wrong.json'}")


def test_a_patch_that_does_not_fit_is_refused(kubectl: Callable[[str], str]) -> None:
    with pytest.raises(RuntimeError, match="nothing"):
        kubectl("""patch daemonset kube-proxy --type=json -p '[{"op": "remove", "path": "/spec/nothing"}]'""")


def test_generations_count_changes_of_the_specification(server: ControlPlane, kubectl: Callable[[str], str]) -> None:
    for number, patch in ((1, {"metadata": {"labels": {"a": "b"}}}), (2, {"spec": {"minReadySeconds": 1}})):
        kubectl(f"patch daemonset kube-proxy --type=merge -p '{json.dumps(patch)}'")
        assert server.store.get(DAEMON_SETS, "kube-system/kube-proxy")["metadata"]["generation"] == number


def test_an_account_may_do_what_its_role_says(server: ControlPlane, kubectl: Callable[[str], str]) -> None:
    (account,) = server.store.all(SERVICE_ACCOUNTS)
    token = rbac.token_of(account)
    user = rbac.user_of(server.store, token)
    assert user == "system:serviceaccount:kube-system:kube-proxy"
    asked = [(SERVICES, "list"), (ENDPOINT_SLICES, "watch"), (SERVICES, "delete"), (CONFIG_MAPS, "list")]

    def answers() -> list[bool]:
        return [rbac.allowed(server.store, user, verb, Place(each, "", "", "")) for each, verb in asked]

    assert answers() == [True, True, False, False]
    kubectl("delete clusterrole system:node-proxier")
    assert not any(answers())
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
def test_nodes_that_a_daemon_set_goes_to(spec: Object, nodes: list[Object]) -> None:
    assert [node for node in (NODE_1, NODE_2) if fits(spec, node)] == nodes


def test_a_status_counts_pods_that_are_ready_and_those_of_the_present_form() -> None:
    (body,) = (each for each in OBJECTS if each["kind"] == "DaemonSet")
    owner = body | {"metadata": body["metadata"] | {"uid": "u", "generation": 7}}
    pod = new_pod(owner, "node-1") | {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    found = status(owner, 2, [pod])
    assert [found[f"number{name}"] for name in ("Ready", "Available", "Unavailable")] == [1, 1, 1]
    changed = owner | {"spec": owner["spec"] | {"template": {"spec": {}}}}
    assert [status(each, 2, [pod])["updatedNumberScheduled"] for each in (owner, changed)] == [1, 0]


def test_commands_of_a_page() -> None:
    text = "See `kubectl get x`:\n```console\n$ a \\\n    -b\none\ntwo\n$ c\n```\nand\n```console\n$ d\n```\n"
    assert transcript(text) == [Said("a \\\n    -b", "one\ntwo\n"), Said("c", ""), Said("d", "")]
    assert mentioned(text) == ["kubectl get x"]


def test_only_what_differs_from_run_to_run_is_left_out() -> None:
    output = 'pod/kube-proxy-1a2b3 condition met\nWaiting for daemon set "kproxy" rollout to finish: 0 of 2\n'
    output += 'daemonset.apps "kproxy" deleted from kube-system namespace\ndone\n'
    left = 'pod/kube-proxy-* condition met\ndaemonset.apps "kproxy" deleted\ndone'
    assert comparable([Said("a", output)]) == [Said("a", left)]
