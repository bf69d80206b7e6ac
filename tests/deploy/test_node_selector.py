"""The commands of docs/operations.md that take kube-proxy off the nodes and put it back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.rendered import ROOT

LABELS = {"k8s-app": "kube-proxy"}
KUBE_PROXY = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "kube-proxy", "namespace": "kube-system"},
    "spec": {
        "selector": {"matchLabels": LABELS},
        "template": {
            "metadata": {"labels": LABELS},
            "spec": {
                "containers": [{"name": "kube-proxy", "image": "registry.k8s.io/kube-proxy:v1.36.0"}],
                "nodeSelector": {"kubernetes.io/os": "linux"},
            },
        },
    },
}


def patches() -> list[tuple[str, str]]:
    """Return type and content of each patch in the page."""
    text = (ROOT / "docs/operations.md").read_text()
    return re.findall(r"patch daemonset kube-proxy --type=(\w+) \\\n +-p '([^']+)'", text)


def patched(body: Any, kind: str, patch: str, folder: Path) -> Any:
    file = folder / "daemonset.json"
    file.write_text(json.dumps(body))
    command = ["kubectl", "patch", "--local", "-f", str(file), f"--type={kind}", "-p", patch, "-o", "json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_kube_proxy_leaves_every_node_and_comes_back_as_it_was(tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl not found")
    (there, off), (back, on) = patches()
    away = patched(KUBE_PROXY, there, off, tmp_path)
    selector = away["spec"]["template"]["spec"]["nodeSelector"]
    assert selector == {"kubernetes.io/os": "linux", "kproxy/replaced": "true"}
    assert patched(away, back, on, tmp_path) == KUBE_PROXY
