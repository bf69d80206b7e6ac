"""Privileged pods that run commands on nodes."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.real.api import Api, object_path
from tests.e2e.real.execution import Executor
from tests.e2e.real.namespaces import create_namespace, delete_namespace
from tests.e2e.real.objects import agent_pod, is_ready
from tests.e2e.real.scripts import GET, KILL, status_and_body
from tests.e2e.waiting import until


class Agents:
    """One pod per node, created on first use, in a separate namespace."""

    def __init__(self, api: Api, executor: Executor, name: str, image: str) -> None:
        """`name` is the name of the namespace."""
        self._api, self._executor, self._image = api, executor, image
        self._namespace = name
        self._pods: dict[str, str] = {}

    def close(self) -> None:
        """Delete the pods."""
        if self._pods:
            delete_namespace(self._api, self._namespace)

    def get(self, node: str, url: str) -> tuple[int, str]:
        """Return status and body of a GET made in a node's network. Raises `ConnectionError`."""
        return status_and_body("\n".join(self._run(node, GET, url)))

    def kill(self, node: str, container: str) -> None:
        """Kill a container's processes with SIGKILL."""
        if not self._run(node, KILL, container):
            raise LookupError(f"node {node}: no process with {container} in its cgroup path")

    def _run(self, node: str, script: str, argument: str) -> list[str]:
        return self._executor.lines(self._namespace, self._pod(node), script, argument)

    def _pod(self, node: str) -> str:
        if not self._pods:
            create_namespace(self._api, self._namespace)
        if node not in self._pods:
            pod = f"agent-{len(self._pods)}"
            self._pods[node] = pod
            self._api.create(object_path("Pod", self._namespace), agent_pod(pod, node, self._image))
            path = object_path("Pod", self._namespace, pod)
            until(self._ready(path), f"pod {self._namespace}/{pod} on node {node} is ready")
        return self._pods[node]

    def _ready(self, path: str) -> Callable[[], bool]:
        return lambda: is_ready(self._api.get(path))
