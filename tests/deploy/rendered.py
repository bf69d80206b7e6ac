"""What the kustomizations render, by the real program."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("kind", "replace-kube-proxy")
KUSTOMIZATIONS = {"base": DEPLOY / "base"} | {name: DEPLOY / "overlays" / name for name in OVERLAYS}

Object = dict[str, Any]


def render(name: str) -> list[Object]:
    """Return the objects of a kustomization; skip the test where no program renders it."""
    programs = (["kubectl", "kustomize"], ["kustomize", "build"])
    command = next((each for each in programs if shutil.which(each[0])), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is here")
    return _render(tuple(command), name)


@cache
def _render(command: tuple[str, ...], name: str) -> list[Object]:
    folder = str(KUSTOMIZATIONS[name])
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def one(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def pod(name: str) -> Object:
    """Return the specification of the DaemonSet's Pods."""
    spec: Object = one(render(name), "DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(name: str, called: str = "kproxy") -> Object:
    """Return one container of the DaemonSet's Pods."""
    spec = pod(name)
    (found,) = (item for item in (*spec["initContainers"], *spec["containers"]) if item["name"] == called)
    return dict(found)


def arguments(of: Object, node_name: str) -> list[str]:
    """Return the arguments of a container as the kubelet gives them to it."""
    return [word.replace("$(NODE_NAME)", node_name) for word in of["args"]]
