"""A service proxy's DaemonSet in kube-system: its pods, rollouts and configuration."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from tests.e2e.cluster import Object
from tests.e2e.real.api import Api, object_path
from tests.e2e.real.objects import is_ready
from tests.e2e.waiting import until

NAMESPACE = "kube-system"
ROLLOUT_GUARD = 600.0
"""Maximum seconds of a rollout, which updates one node after another."""


class DaemonSet:
    """A DaemonSet in kube-system."""

    def __init__(self, api: Api, name: str) -> None:
        self.name = name
        self._api = api
        self._path = object_path("DaemonSet", NAMESPACE, name)

    def find(self) -> Object | None:
        """Return the object, or None if it does not exist."""
        return self._api.find(self._path)

    def selector(self) -> str:
        """Return the label selector of its pods."""
        return selector_text(self._api.get(self._path)["spec"]["selector"]["matchLabels"])

    def pods(self) -> list[Object]:
        """Return its pods, terminating ones included."""
        return self._api.items(object_path("Pod", NAMESPACE), labelSelector=self.selector())

    def pod(self, node: str) -> Object:
        """Return the ready pod of a node. Raises `LookupError`."""
        for pod in self.pods():
            if pod["spec"].get("nodeName") == node and is_ready(pod):
                return pod
        raise LookupError(f"DaemonSet {NAMESPACE}/{self.name} has no ready pod on node {node}")

    def log(self, pod: Object, lines: int) -> str:
        """Return the last log lines of a pod."""
        path = object_path("Pod", NAMESPACE, pod["metadata"]["name"])
        return self._api.text(f"{path}/log", tailLines=str(lines), container=pod["spec"]["containers"][0]["name"])

    def delete_pod(self, pod: Object) -> None:
        """Delete a pod, as an upgrade does. The controller replaces it."""
        self._api.delete(object_path("Pod", NAMESPACE, pod["metadata"]["name"]))

    def node_selector(self) -> dict[str, str]:
        """Return the nodeSelector of its pods."""
        found: dict[str, str] = self._api.get(self._path)["spec"]["template"]["spec"].get("nodeSelector") or {}
        return found

    def select_nodes(self, labels: Mapping[str, str | None]) -> None:
        """Add labels to the nodeSelector; remove those that are None."""
        self._api.merge(self._path, {"spec": {"template": {"spec": {"nodeSelector": dict(labels)}}}})

    def config_map(self, volume: str) -> str:
        """Return the name of the ConfigMap in a volume of its pods. Raises `LookupError`."""
        for each in self._api.get(self._path)["spec"]["template"]["spec"]["volumes"]:
            if each["name"] == volume and "configMap" in each:
                name: str = each["configMap"]["name"]
                return name
        raise LookupError(f"DaemonSet {NAMESPACE}/{self.name} has no ConfigMap as its volume {volume!r}")

    def use_config_map(self, volume: str, name: str) -> None:
        """Replace the ConfigMap in a volume of its pods, which starts a rollout."""
        volumes = [{"name": volume, "configMap": {"name": name}}]
        self._api.strategic(self._path, {"spec": {"template": {"spec": {"volumes": volumes}}}})

    def wait_for_rollout(self) -> None:
        """Return once every node has a ready pod of the current revision."""
        until(lambda: rolled_out(self._api.get(self._path)), f"rollout of {self.name}", guard=ROLLOUT_GUARD, interval=1)

    def wait_until_gone(self) -> None:
        """Return once it has no pods."""
        until(lambda: not self.pods(), f"no pods of {self.name}", guard=ROLLOUT_GUARD, interval=1)


def rolled_out(found: Object) -> bool:
    """Return whether the status of a DaemonSet reports a complete rollout."""
    status = found.get("status", {})
    desired = status.get("desiredNumberScheduled", 0)
    current = status.get("observedGeneration", 0) >= found["metadata"]["generation"]
    counts = [status.get("updatedNumberScheduled", 0), status.get("numberAvailable", 0)]
    return current and all(count >= desired for count in counts) and status.get("numberUnavailable", 0) == 0


def selector_text(labels: Mapping[str, str]) -> str:
    """Return labels as a label selector."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def with_mode(files: Mapping[str, str], mode: str) -> dict[str, str]:
    """Return the files of a kube-proxy ConfigMap with another `mode` in `config.conf`."""
    configuration = yaml.safe_load(files["config.conf"])
    return dict(files) | {"config.conf": yaml.safe_dump(configuration | {"mode": mode}, sort_keys=False)}
