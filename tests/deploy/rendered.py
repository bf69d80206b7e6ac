"""What the kustomizations render, by the real program."""

from __future__ import annotations

import json
import re
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


OLDEST_KUBECTL = 22
"""Minor version of the first kubectl whose kustomize knows `labels` and `components`; Debian 12 has 1.20."""


def render(name: str) -> list[Object]:
    """Return the objects of a kustomization; skip the test where no program renders it."""
    return build(KUSTOMIZATIONS[name])


def build(folder: Path) -> list[Object]:
    """Return the objects of the kustomization in a folder; skip the test where no program renders it."""
    command, reason = program()
    if reason:
        pytest.skip(reason)
    return _build(command, folder)


@cache
def program() -> tuple[tuple[str, ...], str]:
    """Return the command that renders a folder's kustomization, and why there is none, or ""."""
    if shutil.which("kustomize"):
        return ("kustomize", "build"), ""
    return ("kubectl", "kustomize"), kubectl_problem()


@cache
def kubectl_problem() -> str:
    """Return why kubectl cannot render or apply the kustomizations, or ""."""
    if shutil.which("kubectl") is None:
        return "kubectl not found"
    shown = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, check=True).stdout
    version = json.loads(shown)["clientVersion"]
    minor = int(re.match(r"\d+", version["minor"])[0])  # type: ignore[index] # GKE's is "32+"
    return "" if minor >= OLDEST_KUBECTL else f"kubectl {version['gitVersion']} is older than 1.{OLDEST_KUBECTL}"


@cache
def _build(command: tuple[str, ...], folder: Path) -> list[Object]:
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def one(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def pod(name: str) -> Object:
    """Return the specification of the DaemonSet's Pods."""
    return pod_of(render(name))


def pod_of(objects: list[Object]) -> Object:
    """Return the specification of the Pods of the only DaemonSet among these objects."""
    spec: Object = one(objects, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(name: str, called: str = "kproxy") -> Object:
    """Return one container of the DaemonSet's Pods."""
    return container_of(render(name), called)


def container_of(objects: list[Object], called: str = "kproxy") -> Object:
    """Return one container of the Pods of the only DaemonSet among these objects."""
    spec = pod_of(objects)
    (found,) = (item for item in (*spec["initContainers"], *spec["containers"]) if item["name"] == called)
    return dict(found)


def images(objects: list[Object]) -> set[str]:
    """Return the images of all containers of the only DaemonSet among these objects."""
    spec = pod_of(objects)
    return {item["image"] for item in (*spec["initContainers"], *spec["containers"])}


def arguments(of: Object, node_name: str) -> list[str]:
    """Return the arguments of a container as the kubelet gives them to it."""
    return [word.replace("$(NODE_NAME)", node_name) for word in of["args"]]
