"""`kubectl kproxy` picks the pod of a node and runs a command there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kproxy.cli.console import CannotTellError
from kproxy.cli.kubectl_plugin import choose_pod

STUB = """\
#!/bin/sh
echo "$@" >> {log}
case "$1" in
get) cat {pods} ;;
exec) echo "output of the pod"; exit 1 ;;
esac
"""


def pod(name: str, *, phase: str = "Running", ready: bool = True) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": str(ready)}]
    status = {"phase": phase, "conditions": conditions}
    return {"metadata": {"name": name}, "spec": {"nodeName": f"node-of-{name}"}, "status": status}


def test_a_ready_pod_is_preferred() -> None:
    assert choose_pod([pod("a", ready=False), pod("c"), pod("b")], None, "kube-system") == ("b", "node-of-b")
    assert choose_pod([pod("a", ready=False)], "node-1", "kube-system").name == "a"
    stopping = pod("a")
    stopping["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert choose_pod([stopping, pod("b", ready=False)], None, "kube-system").name == "b"


@pytest.mark.parametrize(
    ("pods", "text"),
    [([], "runs in namespace proxies on node node-1"), ([pod("a", phase="Pending")], "(1 of them do not run)")],
)
def test_without_a_running_pod_nothing_can_be_told(pods: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(CannotTellError) as caught:
        choose_pod(pods, "node-1", "proxies")
    assert text in str(caught.value)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the plugin with a stub of kubectl, which notes its arguments."""
    stub = folder / "kubectl"
    (folder / "pods.json").write_text(json.dumps({"items": [pod("kproxy-x1")]}))
    stub.write_text(STUB.format(log=folder / "log", pods=folder / "pods.json"))
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    program = "import sys; from kproxy.cli.kubectl_plugin import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def test_the_command_runs_in_the_pod_of_the_node(tmp_path: Path) -> None:
    done = run(tmp_path, "--node=node-1", "--context=lab", "status", "-o", "json")
    assert (done.returncode, done.stdout) == (1, "output of the pod\n")
    listing, execution = (tmp_path / "log").read_text().splitlines()
    access = "--context=lab --namespace=kube-system"
    selectors = "--selector=app.kubernetes.io/name=kproxy --output=json --field-selector=spec.nodeName=node-1"
    assert listing == f"get pods {access} {selectors}"
    assert execution == f"exec {access} kproxy-x1 --container=kproxy -- kproxy status -o json"


@pytest.mark.parametrize("flag", ["--objects=/all.yaml", "--kubeconfig=/mine", "--help", "--unknown"])
def test_explain_with_other_objects_is_passed_on_as_it_is(tmp_path: Path, flag: str) -> None:
    assert run(tmp_path, "explain", "shop/api", flag).returncode == 1
    _, execution = (tmp_path / "log").read_text().splitlines()
    assert execution == (f"exec --namespace=kube-system kproxy-x1 --container=kproxy -- kproxy explain shop/api {flag}")


def test_explain_of_an_invalid_name_is_a_usage_error(tmp_path: Path) -> None:
    done = run(tmp_path, "explain", "a/b/c")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the Service must be NAMESPACE/NAME or NAME, not 'a/b/c'" in done.stderr


def test_without_a_command_the_usage_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, "--node=node-1")
    assert done.returncode == 2
    assert "no COMMAND is given" in done.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_finds_the_plugin_and_its_flags_are_real(tmp_path: Path) -> None:
    """The real kubectl accepts the flags, and fails because no API server listens."""
    plugin = tmp_path / "kubectl-kproxy"
    program = "import sys; from kproxy.cli.kubectl_plugin import main; sys.exit(main())"
    plugin.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}' \"$@\"\n")
    plugin.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBECONFIG": str(tmp_path / "none")}
    command = ["kubectl", "kproxy", "--node=node-1", "--server=http://127.0.0.1:1", "status"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "kubectl cannot list the pods: The connection to the server 127.0.0.1:1 was refused" in done.stderr
