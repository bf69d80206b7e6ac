"""`make kind-up` selects the proxy mode and the nodes' image. Stubs stand in for kind, kubectl and docker."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from kproxy.config.types import Mode
from tests.deploy.rendered import DEPLOY, ROOT, build, container_of, images, one
from tests.deploy.settings import parsed

NODE_IMAGE = "kindest/node:v1.36.4"
STUB = """#!/bin/sh
echo "${0##*/} $*" >>calls.log
case "${0##*/} $*" in
"kind get clusters") cat clusters ;;
esac
"""


class Checkout:
    """A copy of what `make kind-up` reads, and the stubs that it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(DEPLOY, folder / "deploy", ignore=shutil.ignore_patterns("site"))
        for name in ("Makefile", "kind-config.yaml"):
            shutil.copy(ROOT / name, folder)
        (folder / "clusters").touch()
        (folder / "bin").mkdir()
        for name in ("kind", "kubectl", "docker"):
            (folder / "bin" / name).write_text(STUB)
            (folder / "bin" / name).chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env={"PATH": f"{self.folder}/bin:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self, program: str) -> list[str]:
        """Return the arguments of all calls of a stub."""
        lines = (self.folder / "calls.log").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    if shutil.which("make") is None:
        pytest.skip("make not found")
    return Checkout(tmp_path)


def mode_of(checkout: Checkout) -> str:
    """Return the mode that kproxy reads from the kustomization that was applied."""
    assert "apply -k build/kind" in checkout.calls("kubectl")
    objects = build(checkout.folder / "build/kind")
    assert images(objects) == {"localhost/kproxy:dev"}
    files: dict[str, str] = one(objects, "ConfigMap")["data"]
    folder = checkout.folder / "mounted"
    folder.mkdir()
    config = parsed(container_of(objects), files, folder)[1]
    assert config.cluster_cidr == "10.244.0.0/16,fd00:10:244::/56"
    return config.mode


@pytest.mark.parametrize("mode", get_args(Mode))
def test_mode_is_the_one_that_kproxy_runs_in(checkout: Checkout, mode: str) -> None:
    done = checkout.make("kind-up", f"MODE={mode}")
    assert done.returncode == 0, done.stderr
    assert mode_of(checkout) == mode


def test_without_mode_the_overlay_counts(checkout: Checkout) -> None:
    done = subprocess.run(
        ["sh", "deploy/kind.sh", "up", "localhost/kproxy:dev"],
        cwd=checkout.folder,
        env={"PATH": f"{checkout.folder}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert mode_of(checkout) == "iptables"


def test_each_mode_has_a_config_map_of_its_own_so_that_a_change_rolls_out(checkout: Checkout) -> None:
    names = set()
    for mode in get_args(Mode):
        assert checkout.make("kind-up", f"MODE={mode}").returncode == 0
        shutil.copytree(checkout.folder / "build/kind", checkout.folder / "build" / mode)
        names.add(one(build(checkout.folder / "build" / mode), "ConfigMap")["metadata"]["name"])
    assert len(names) == len(get_args(Mode))


def test_an_unknown_mode_is_rejected_before_anything_is_built(checkout: Checkout) -> None:
    done = checkout.make("kind-up", "MODE=ipvs")
    assert done.returncode != 0
    assert 'kind.sh: MODE must be iptables or nftables, not "ipvs"' in done.stderr
    assert not (checkout.folder / "calls.log").exists()


def test_the_node_image_selects_the_kubernetes_version_of_a_new_cluster(checkout: Checkout) -> None:
    assert checkout.make("kind-up", f"NODE_IMAGE={NODE_IMAGE}").returncode == 0
    (created,) = (call for call in checkout.calls("kind") if call.startswith("create cluster"))
    assert created == f"create cluster --name kproxy --config kind-config.yaml --image {NODE_IMAGE}"


def test_without_node_image_kind_decides(checkout: Checkout) -> None:
    assert checkout.make("kind-up").returncode == 0
    assert "create cluster --name kproxy --config kind-config.yaml" in checkout.calls("kind")


def test_an_existing_cluster_is_updated(checkout: Checkout) -> None:
    (checkout.folder / "clusters").write_text("other\nkproxy\n")
    assert checkout.make("kind-up").returncode == 0
    assert [call for call in checkout.calls("kind") if call.startswith("create")] == []
    assert "load image-archive build/image.tar --name kproxy" in checkout.calls("kind")
    assert "-n kube-system rollout restart daemonset/kproxy" in checkout.calls("kubectl")


@pytest.mark.parametrize("arguments", [[], ["up"], ["down", "now"], ["sideways"]])
def test_other_arguments_are_an_error(arguments: list[str]) -> None:
    script = str(DEPLOY / "kind.sh")
    done = subprocess.run(["sh", script, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: kind.sh up IMAGE | down\n")
