"""`kubectl kproxy explain` on a laptop says what `kproxy explain` says on the node with the caller's kubeconfig."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.api.node import NodeDaemon
from tests.apiserver import ApiServer
from tests.deploy.tls import server_tls
from tests.unit.explain_cases import BROKEN, SOUND, SetUp

STUB = '''\
#!{python}
"""Stands in for kubectl: asks the API server as kubectl does, and runs commands in the node's network namespace."""

import json, os, ssl, subprocess, sys, urllib.error, urllib.request

arguments = sys.argv[1:]
if arguments[:2] == ["get", "pods"]:
    print({pods!r})
elif arguments[0] == "get" and {kubectl!r}:
    os.execv({kubectl!r}, ["kubectl", *arguments])
elif arguments[0] == "get":
    with open(os.environ["KUBECONFIG"]) as file:
        access = json.load(file)
    server = access["clusters"][0]["cluster"]["server"]
    token = access["users"][0]["user"]["token"]
    uri = next(each.removeprefix("--raw=") for each in arguments if each.startswith("--raw="))
    try:
        request = urllib.request.Request(server + uri, headers={{"Authorization": "Bearer " + token}})
        sys.stdout.buffer.write(urllib.request.urlopen(request, context=ssl._create_unverified_context()).read())
    except urllib.error.HTTPError as error:
        status = json.load(error)
        sys.exit("Error from server ({{}}): {{}}".format(status["reason"], status["message"]))
    except OSError as error:
        sys.exit("The connection to the server " + server + " was refused - did you specify the right host or port?")
else:
    command = arguments[arguments.index("--") + 2:]
    assert arguments[0] == "exec" and "kproxy-x1" in arguments and "--container=kproxy" in arguments
    del os.environ["KUBECONFIG"]
    os.environ["HOME"] = "/nonexistent"
    sys.exit(subprocess.run(["nsenter", {namespace!r}, sys.executable, "-m", "kproxy", *command]).returncode)
'''
PODS = {
    "items": [
        {
            "metadata": {"name": "kproxy-x1"},
            "spec": {"nodeName": "node-1"},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
        }
    ]
}
PLUGIN = (sys.executable, "-c", "import sys; from kproxy.cli.kubectl_plugin import main; sys.exit(main())")
ONLY_FOR_CALLERS = ("/pods", "/networkpolicies")
SETUPS = {setup.name: setup for setup in (*BROKEN, *SOUND)}
CHOSEN = (
    "ClusterIP",
    next(setup.name for setup in BROKEN if setup.code == "SelectorMatchesNothing"),
    next(setup.name for setup in BROKEN if setup.code == "TargetPortUnresolved"),
    "crashing pods",
    next(setup.name for setup in BROKEN if setup.code == "NoSuchService"),
)


class Laptop:
    """A computer with a kubeconfig and kubectl, and a node with a daemon, in a network namespace."""

    def __init__(self, api: ApiServer, node: NodeDaemon, folder: Path, kubectl: str) -> None:
        self.api, self.node = api, node
        self._folder = folder
        self.kubeconfig = api.kubeconfig(folder / "mine.kubeconfig", token="mine")
        stub = folder / "bin/kubectl"
        stub.parent.mkdir()
        namespace = f"--net=/proc/{os.getpid()}/fd/{node.namespace.fd}"
        text = STUB.format(python=sys.executable, pods=json.dumps(PODS), kubectl=kubectl, namespace=namespace)
        stub.write_text(text)
        stub.chmod(0o755)

    def fill(self, setup: SetUp) -> None:
        for each in yaml.safe_load_all(setup.yaml):
            self.api.create(each)
        self.node.start()
        self.node.settle()

    def explain(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Run `kubectl kproxy explain`."""
        path = f"{self._folder / 'bin'}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "KUBECONFIG": str(self.kubeconfig)}
        command = [*PLUGIN, "--node=node-1", "explain", *arguments, "--output=json"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode in {0, 1}, done.stderr
        return done.returncode, json.loads(done.stdout)

    def explain_on_node(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Run `kproxy explain` on the node, with the same kubeconfig."""
        port = self.node.relay.port
        kubeconfig = self.api.kubeconfig(self._folder / "on-node.kubeconfig", token="mine", port=port)
        command = [sys.executable, "-m", "kproxy", "explain", *arguments, f"--kubeconfig={kubeconfig}", "-o", "json"]
        done = self.node.namespace.run(command, check=False)
        assert done.returncode in {0, 1}, done.stderr
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def kubectl() -> str:
    """The program that reads the objects. By default, the stub itself reads them."""
    return ""


with_real_kubectl = pytest.mark.parametrize(
    "kubectl",
    [
        "",
        pytest.param(
            shutil.which("kubectl"),
            marks=pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
        ),
    ],
    ids=["stub", "kubectl"],
)


@pytest.fixture
def laptop(kubectl: str, tmp_path: Path) -> Iterator[Laptop]:
    with ApiServer(tokens=["secret"], tls=server_tls(tmp_path, "127.0.0.1")) as api:
        api.tokens.add("mine")
        node = NodeDaemon(api, tmp_path)
        try:
            yield Laptop(api, node, tmp_path, kubectl)
        finally:
            node.close()


def without_access(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without the name of the access to the API server, which differs."""
    for each in report["sources"]:
        if each["name"] == "API server" and each["used"]:
            each["detail"] = ""
    return report


@pytest.mark.parametrize("name", CHOSEN)
def test_the_answer_is_that_of_the_node(laptop: Laptop, name: str) -> None:
    setup = SETUPS[name]
    laptop.fill(setup)
    code, report = laptop.explain(setup.key)
    asked = [each for each in laptop.api.requests.all() if each.path.endswith(ONLY_FOR_CALLERS)]
    assert asked or setup.code == "NoSuchService"
    assert {each.headers["Authorization"] for each in asked} <= {"Bearer mine"}
    assert (report["verdict"], report["reason"] and report["reason"]["code"]) == (setup.verdict, setup.code)
    assert {each["name"] for each in report["sources"] if each["used"]} >= {"daemon", "API server"}
    same_code, same = laptop.explain_on_node(setup.key)
    assert (code, without_access(report)) == (same_code, without_access(same))


@with_real_kubectl
def test_a_client_is_looked_up_with_the_callers_access(laptop: Laptop) -> None:
    laptop.fill(SETUPS["ClusterIP"])
    _, report = laptop.explain("shop/api", "--from=192.168.0.12")
    assert report["client"]["location"] == "node node-2"
    assert without_access(report) == without_access(laptop.explain_on_node("shop/api", "--from=192.168.0.12")[1])


@with_real_kubectl
def test_what_the_caller_may_not_read_is_said(laptop: Laptop) -> None:
    laptop.fill(SETUPS["crashing pods"])
    laptop.api.faults.hidden = {"pods": 403, "networkpolicies": 403}
    _, report = laptop.explain("shop/api")
    assert report["reason"]["code"] == "NoReadyEndpoints"
    assert any("/pods: " in text and "forbidden" in text for text in report["unseen"])
    assert report["unseen"] == laptop.explain_on_node("shop/api")[1]["unseen"]


@with_real_kubectl
@pytest.mark.parametrize("problem", ["forbidden", "unreachable", "unauthorized"])
def test_without_any_access_the_daemon_still_answers(laptop: Laptop, problem: str, tmp_path: Path) -> None:
    laptop.fill(SETUPS["crashing pods"])
    if problem == "forbidden":
        laptop.api.faults.hidden = dict.fromkeys(("services", "endpointslices", "pods", "nodes"), 403)
    else:
        access = {"token": "mine", "port": 1} if problem == "unreachable" else {"token": "wrong"}
        laptop.kubeconfig = laptop.api.kubeconfig(tmp_path / "other.kubeconfig", **access)
    code, report = laptop.explain("shop/api")
    assert (code, report["verdict"], report["reason"]["code"]) == (1, "REJECTED", "NoReadyEndpoints")
    notes = [text for text in report["unseen"] if text.startswith("API server: with the kubeconfig of the caller")]
    expected = {"forbidden": "is forbidden", "unreachable": "refused", "unauthorized": "nauthorized"}
    assert len(notes) == 1
    assert expected[problem] in notes[0]
