"""`kproxy bundle` collects what a bug report needs, and other commands accept its files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.kernel.test_control_socket import NOBODY, command, write
from tests.lab.modes import BOTH_MODES, mode_flag
from tests.lab.proxy import KPROXY, Daemon
from tests.lab.topology import NODE, Lab

OBJECTS = """\
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: secretshop}
spec: {clusterIP: 10.96.0.81, clusterIPs: [10.96.0.81], ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cart-x1, namespace: secretshop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.7], nodeName: hiddennode, conditions: {ready: true}}]
"""
LARGE = OBJECTS.replace("cart", "large").replace("10.96.0.81", "10.96.0.82")
SLICES = 6
"""The number of EndpointSlices with 1,000 endpoints: more than the daemon sends in one answer."""
EXPECTED = {"objects.json", "versions.txt", "status.json", "configuration.json", "log.txt", "metrics.txt"}


def bundle(lab: Lab, path: Path, *flags: str) -> dict[str, str]:
    done = command(lab, "bundle", str(path), *flags)
    assert (done.returncode, done.stdout) == (0, f"{path}\n")
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name.removeprefix("kproxy-bundle/"): file.read().decode() for name, file in files.items() if file}


@BOTH_MODES
def test_a_bundle_contains_everything_and_its_objects_give_the_same_rules(lab: Lab, tmp_path: Path, mode: str) -> None:
    write(tmp_path / "objects", OBJECTS)
    with Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag(mode)) as daemon:
        daemon.wait_until_synced()
        files = bundle(lab, tmp_path / "bundle.tar.gz")
        assert files.keys() > EXPECTED
        rules = files["iptables-save.txt" if mode == "iptables" else "nft-ruleset.txt"]
        assert "secretshop/cart" in rules
        assert "synced" in files["log.txt"]
        assert "kubeproxy_sync_proxy_rules" in files["metrics.txt"]
        assert json.loads(files["configuration.json"])["mode"] == mode
        assert json.loads(files["status.json"])["health"] == "Healthy"
        objects = tmp_path / "objects.json"
        objects.write_text(files["objects.json"])
        render = (f"--hostname-override={NODE}", mode_flag(mode))
        ours = command(lab, "render", f"--objects={tmp_path / 'objects'}", *render)
        theirs = command(lab, "render", f"--objects={objects}", *render)
        assert ours.returncode == 0
        assert ours.stdout == theirs.stdout


def test_a_bundle_contains_all_endpoints_of_a_large_service(lab: Lab, tmp_path: Path) -> None:
    service, endpoints = LARGE.split("---\n")
    slices = [
        endpoints.replace("large-x1", f"large-x{number}").replace(
            "endpoints: [",
            "endpoints: ["
            + "".join(f"{{addresses: [10.{number}.{each // 250}.{each % 250}]}}, " for each in range(999)),
        )
        for number in range(1, SLICES + 1)
    ]
    write(tmp_path / "objects", "---\n".join([OBJECTS, service, *slices]))
    with Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag("nftables")) as daemon:
        daemon.wait_until_synced()
        files = bundle(lab, tmp_path / "bundle.tar.gz")
    found = json.loads(files["objects.json"])["items"]
    sizes = {each["metadata"]["name"]: len(each["endpoints"]) for each in found if each["kind"] == "EndpointSlice"}
    assert sizes == {"cart-x1": 1, **{f"large-x{number}": 1000 for number in range(1, SLICES + 1)}}
    assert sorted(each["metadata"]["name"] for each in found if each["kind"] == "Service") == ["cart", "large"]


@BOTH_MODES
def test_an_anonymized_bundle_contains_no_names(lab: Lab, tmp_path: Path, mode: str) -> None:
    write(tmp_path / "objects", OBJECTS)
    with Daemon(lab, tmp_path / "objects", tmp_path / "kproxy.log", mode_flag(mode)) as daemon:
        daemon.wait_until_synced()
        plain = bundle(lab, tmp_path / "plain.tar.gz")
        files = bundle(lab, tmp_path / "bundle.tar.gz", "--anonymize")
    for name in ("secretshop", "cart", "hiddennode"):
        assert name in "".join(plain.values())
        assert [file for file, text in files.items() if name in text.replace(str(tmp_path), "")] == []
    assert files.keys() == plain.keys()


def test_a_bundle_without_a_daemon_says_what_is_missing(lab: Lab, tmp_path: Path) -> None:
    files = bundle(lab, tmp_path / "bundle.tar.gz")
    assert "status.json: no kproxy daemon answers" in files["problems.txt"]
    assert "versions.txt" in files


@pytest.mark.parametrize("path", ["bundle.tar.gz", "-"])
def test_an_ordinary_user_gets_one_line(lab: Lab, path: str) -> None:
    done = lab.node.namespace.run(
        ["setpriv", f"--reuid={NOBODY}", "--clear-groups", KPROXY, "bundle", path], check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == ("kproxy: only root may read the rules and ask the daemon: run this command as root\n")
