"""`kproxy apply` fails if the real kernel rejects a Service, and programs all others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kproxy.app.one_shot import apply
from kproxy.config import Config
from kproxy.model.sync_report import SyncError
from kproxy.model.types import Family
from tests.kernel.test_iptables_isolation import without_recent
from tests.kernel.test_nftables_quarantine import CorruptingEncoder
from tests.lab.iptables import current_rules, link_programs, programs_of
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A file with two Services, `ns/good` and `ns/bad`. The second one has session affinity."""
    items = [*_service("good", 1), *_service("bad", 2, sessionAffinity="ClientIP")]
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    return path


def _service(name: str, number: int, **spec: str) -> list[dict[str, Any]]:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "ns"},
        "spec": {"clusterIP": f"10.96.0.{number}", "ports": [{"port": 80, "protocol": "TCP"}], **spec},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": name}},
        "endpoints": [{"addresses": [f"10.244.0.{number}"]}],
        "ports": [{"port": 8080, "protocol": "TCP", "name": ""}],
    }
    return [service, endpoints]


def test_apply_in_iptables_mode_fails_and_names_the_service(
    node: Namespace, objects: Path, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_programs(programs_of(variant), tmp_path)
    without_recent(tmp_path, variant)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    done = node.run([KPROXY, "apply", "--proxy-mode=iptables", f"--objects={objects}"], check=False)
    assert done.returncode == 1, done.stderr
    assert "kproxy: IPv4: the kernel rejected the rules of Service ns/bad: " in done.stderr.splitlines()[-1]
    rules = str(current_rules(node, Family.IPV4))
    assert "10.96.0.1/32" in rules
    assert "10.96.0.2/32" not in rules


def test_apply_in_nftables_mode_fails_and_names_the_service(
    node: Namespace, objects: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.nftables.kernel.TransactionEncoder", CorruptingEncoder)
    monkeypatch.setattr(CorruptingEncoder, "refuse", lambda _, kind, name: kind == "set" and "bad" in name)
    with pytest.raises(SyncError, match=r"^IPv4: the kernel rejected the rules of Service ns/bad: .*affinity.*$"):
        node.call(lambda: apply(Config(mode="nftables"), str(objects)))
    listed = node.run(["nft", "list", "map", "ip", "kube-proxy", "service-ips"]).stdout
    assert "10.96.0.1 " in listed
    assert "10.96.0.2 " not in listed
