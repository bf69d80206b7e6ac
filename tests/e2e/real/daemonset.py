"""A DaemonSet of kube-system that is a service proxy: its pods, its rollouts, its configuration."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from tests.e2e.cluster import Object
from tests.e2e.real.api import Api, place
from tests.e2e.real.objects import is_ready
from tests.e2e.waiting import until

NAMESPACE = "kube-system"
ROLLOUT_GUARD = 600.0
"""Seconds for all nodes, which follow one after the other."""


class DaemonSet:
    """One by its name."""

    def __init__(self, api: Api, name: str) -> None:
        self.name = name
        self._api = api
        self._path = place("DaemonSet", NAMESPACE, name)

    def found(self) -> Object | None:
        """Return it as the API has it, None if the cluster has none."""
        return self._api.find(self._path)

    def selector(self) -> str:
        """Return the label selector of its pods."""
        return selector_text(self._api.get(self._path)["spec"]["selector"]["matchLabels"])

    def pods(self) -> list[Object]:
        """Return its pods, those that end included."""
        return self._api.items(place("Pod", NAMESPACE), labelSelector=self.selector())

    def pod(self, node: str) -> Object:
        """Return the ready pod of a node. Raises `LookupError`."""
        for pod in self.pods():
            if pod["spec"].get("nodeName") == node and is_ready(pod):
                return pod
        raise LookupError(f"DaemonSet {NAMESPACE}/{self.name} has no ready pod on node {node}")

    def log(self, pod: Object, lines: int) -> str:
        """Return the last lines that a pod wrote."""
        path = place("Pod", NAMESPACE, pod["metadata"]["name"])
        return self._api.text(f"{path}/log", tailLines=str(lines), container=pod["spec"]["containers"][0]["name"])

    def delete_pod(self, pod: Object) -> None:
        """End a pod as an upgrade does; another takes its place."""
        self._api.delete(place("Pod", NAMESPACE, pod["metadata"]["name"]))

    def node_selector(self) -> dict[str, str]:
        """Return the labels of the nodes that it runs on."""
        found: dict[str, str] = self._api.get(self._path)["spec"]["template"]["spec"].get("nodeSelector") or {}
        return found

    def select_nodes(self, labels: Mapping[str, str | None]) -> None:
        """Add labels to those that its nodes need; remove those that are None here."""
        self._api.merge(self._path, {"spec": {"template": {"spec": {"nodeSelector": dict(labels)}}}})

    def config_map(self, volume: str) -> str:
        """Return the name of the ConfigMap that a volume of its pods holds. Raises `LookupError`."""
        for each in self._api.get(self._path)["spec"]["template"]["spec"]["volumes"]:
            if each["name"] == volume and "configMap" in each:
                name: str = each["configMap"]["name"]
                return name
        raise LookupError(f"DaemonSet {NAMESPACE}/{self.name} has no ConfigMap as its volume {volume!r}")

    def take_config_map(self, volume: str, name: str) -> None:
        """Let a volume of its pods hold another ConfigMap, which rolls out."""
        volumes = [{"name": volume, "configMap": {"name": name}}]
        self._api.strategic(self._path, {"spec": {"template": {"spec": {"volumes": volumes}}}})

    def wait_for_rollout(self) -> None:
        """Return once every node that it is for has a ready pod of its present form."""
        until(lambda: rolled_out(self._api.get(self._path)), f"rollout of {self.name}", guard=ROLLOUT_GUARD, between=1)

    def wait_until_gone(self) -> None:
        """Return once it has no pods."""
        until(lambda: not self.pods(), f"no pods of {self.name}", guard=ROLLOUT_GUARD, between=1)


def rolled_out(found: Object) -> bool:
    """Return whether a DaemonSet's status says that its present form runs everywhere."""
    status = found.get("status", {})
    wanted = status.get("desiredNumberScheduled", 0)
    current = status.get("observedGeneration", 0) >= found["metadata"]["generation"]
    counts = [status.get("updatedNumberScheduled", 0), status.get("numberAvailable", 0)]
    return current and all(count >= wanted for count in counts) and status.get("numberUnavailable", 0) == 0


def selector_text(labels: Mapping[str, str]) -> str:
    """Return labels as a label selector."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def in_other_mode(files: Mapping[str, str], mode: str) -> dict[str, str]:
    """Return the files of a kube-proxy ConfigMap with another `mode` in `config.conf`, all else as it is."""
    configuration = yaml.safe_load(files["config.conf"])
    return dict(files) | {"config.conf": yaml.safe_dump(configuration | {"mode": mode}, sort_keys=False)}
