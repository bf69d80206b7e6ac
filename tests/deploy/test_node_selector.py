"""The commands in docs/operations.md that remove kube-proxy from the nodes and restore it."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.deploy.patch import patched
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
    """Return type and content of each patch on the page."""
    text = (ROOT / "docs/operations.md").read_text()
    return re.findall(r"patch daemonset kube-proxy --type=(\w+) \\\n +-p '([^']+)'", text)


def test_kube_proxy_is_removed_from_every_node_and_restored_unchanged() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl not found")
    remove, restore = patches()
    removed = patched(KUBE_PROXY, *remove)
    selector = removed["spec"]["template"]["spec"]["nodeSelector"]
    assert selector == {"kubernetes.io/os": "linux", "kproxy/replaced": "true"}
    assert patched(removed, *restore) == KUBE_PROXY
