"""The objects that the kustomizations render, as printed by kustomize or kubectl."""

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
"""First minor version of kubectl whose kustomize supports `labels` and `components`; Debian 12 has 1.20."""


def render(name: str) -> list[Object]:
    """Return the objects of a kustomization. Skips the test if no program can render it."""
    return build(KUSTOMIZATIONS[name])


def build(folder: Path) -> list[Object]:
    """Return the objects of the kustomization in a directory. Skips the test if no program can render it."""
    command, reason = program()
    if reason:
        pytest.skip(reason)
    return _build(command, folder)


@cache
def program() -> tuple[tuple[str, ...], str]:
    """Return the command that renders a directory, and the reason why it is not usable, or ""."""
    if shutil.which("kustomize"):
        return ("kustomize", "build"), ""
    return ("kubectl", "kustomize"), kubectl_problem()


@cache
def kubectl_problem() -> str:
    """Return the reason why kubectl cannot render or apply the kustomizations, or ""."""
    if shutil.which("kubectl") is None:
        return "kubectl not found"
    output = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, check=True).stdout
    version = json.loads(output)["clientVersion"]
    minor = int(re.match(r"\d+", version["minor"])[0])  # type: ignore[index] # on GKE, for example "32+"
    return "" if minor >= OLDEST_KUBECTL else f"kubectl {version['gitVersion']} is older than 1.{OLDEST_KUBECTL}"


@cache
def _build(command: tuple[str, ...], folder: Path) -> list[Object]:
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def schemas() -> Any:
    """Return the module that validates objects against the Kubernetes schemas. Skips the test if it is missing."""
    return pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")


def one(objects: list[Object], kind: str) -> Object:
    """Return the only object of a kind."""
    (only,) = (item for item in objects if item["kind"] == kind)
    return only


def pod(name: str) -> Object:
    """Return the Pod specification in the DaemonSet of a kustomization."""
    return pod_of(render(name))


def pod_of(objects: list[Object]) -> Object:
    """Return the Pod specification in the only DaemonSet among the objects."""
    spec: Object = one(objects, "DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(name: str, container_name: str = "kproxy") -> Object:
    """Return one container of the DaemonSet of a kustomization."""
    return container_of(render(name), container_name)


def container_of(objects: list[Object], container_name: str = "kproxy") -> Object:
    """Return one container of the only DaemonSet among the objects."""
    spec = pod_of(objects)
    (only,) = (item for item in (*spec["initContainers"], *spec["containers"]) if item["name"] == container_name)
    return dict(only)


def images(objects: list[Object]) -> set[str]:
    """Return the images of all containers of the only DaemonSet among the objects."""
    spec = pod_of(objects)
    return {item["image"] for item in (*spec["initContainers"], *spec["containers"])}


def arguments(spec: Object, node_name: str) -> list[str]:
    """Return the arguments of a container after the kubelet has expanded its environment variables."""
    return [word.replace("$(NODE_NAME)", node_name) for word in spec["args"]]
