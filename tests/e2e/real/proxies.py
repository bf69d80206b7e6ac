"""kproxy's DaemonSet in kube-system, and kube-proxy's if it is disabled as docs/operations.md describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import yaml

from tests.e2e.cluster import Mode, Node, Object
from tests.e2e.real.agents import Agents
from tests.e2e.real.api import Api, object_path
from tests.e2e.real.daemonset import NAMESPACE, DaemonSet, with_mode
from tests.e2e.waiting import until

VOLUME = "config"
"""The volume of kproxy's pods with `config.conf` in it, see deploy/base."""

MODE_URL = "http://127.0.0.1:10249/proxyMode"
REPLACED_LABEL = "kproxy/replaced"
"""The node label in the nodeSelector of a disabled proxy (docs/operations.md). No node has it."""


class RealProxies:
    """kproxy on the nodes of a real cluster."""

    def __init__(self, api: Api, agents: Agents, daemonset: str, nodes: Sequence[Node]) -> None:
        self._api, self._agents, self._nodes = api, agents, nodes
        self._kproxy = DaemonSet(api, daemonset)
        self._kube_proxy = DaemonSet(api, "kube-proxy")

    def missing(self) -> str:
        """Return why the cluster cannot be tested, "" if kproxy runs on it."""
        if self._kproxy.find() is None:
            return f"the cluster has no DaemonSet {NAMESPACE}/{self._kproxy.name}; set --e2e-daemonset to its name"
        return ""

    def lacks_kube_proxy(self) -> str:
        """Return why kproxy and kube-proxy cannot be swapped, "" if they can."""
        if self._kube_proxy.find() is None:
            return f"the cluster has no DaemonSet {NAMESPACE}/kube-proxy"
        if REPLACED_LABEL not in self._kube_proxy.node_selector():
            return f"DaemonSet {NAMESPACE}/kube-proxy is not disabled by the nodeSelector {REPLACED_LABEL}"
        files = self._files("kube-proxy")
        mode = yaml.safe_load(files["config.conf"]).get("mode", "")
        if mode in {"iptables", "nftables"}:
            return ""
        # Otherwise the two may use different modes. kube-proxy removes rules of other modes before its first sync.
        return f"kube-proxy's mode is {mode!r}: set iptables or nftables, so that both proxies use the same mode"

    def mode(self) -> Mode:
        """Return the mode from /proxyMode of all nodes. Raises `ValueError` if they differ."""
        modes = {node.name: self._mode_of(node) for node in self._nodes}
        for mode in ("iptables", "nftables"):
            if set(modes.values()) == {mode}:
                return mode
        raise ValueError(f"nodes are in different modes: {modes}")

    def restart(self, node: str) -> None:
        """Delete the node's pod; return once its replacement is ready."""
        old = self._kproxy.pod(node)
        self._kproxy.delete_pod(old)
        self._wait_for_replacement(node, lambda pod: pod["metadata"]["uid"] != old["metadata"]["uid"])

    def kill(self, node: str) -> None:
        """Kill the process; return once kubelet has restarted it and the pod is ready."""
        old = _container(self._kproxy.pod(node))
        self._agents.kill(node, old.partition("://")[2])
        self._wait_for_replacement(node, lambda pod: _container(pod) != old)

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Roll out a copy of the configuration with another mode, and afterwards the original configuration."""
        if self.mode() == mode:
            yield
            return
        before = self._kproxy.config_map(VOLUME)
        copy = f"{before}-e2e-{mode}"
        metadata = {"name": copy, "namespace": NAMESPACE}
        files = with_mode(self._files(before), mode)
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files}
        self._api.apply(object_path("ConfigMap", NAMESPACE, copy), body)
        try:
            self._roll_out(copy)
            until(lambda: self._all_in(mode), f"every node is in {mode} mode")
            yield
        finally:
            self._roll_out(before)
            self._api.delete(object_path("ConfigMap", NAMESPACE, copy))

    @contextmanager
    def replaced_by_kube_proxy(self) -> Iterator[None]:
        """Disable kproxy as docs/operations.md disables kube-proxy, which keeps its objects."""
        try:
            self._swap(self._kproxy, self._kube_proxy)
            yield
        finally:
            self._swap(self._kube_proxy, self._kproxy)

    def logs(self, lines: int) -> Iterator[tuple[str, str]]:
        """Yield the node and the last log lines of each kproxy pod."""
        for pod in self._kproxy.pods():
            yield pod["spec"].get("nodeName", "no node"), self._kproxy.log(pod, lines)

    def _swap(self, old: DaemonSet, new: DaemonSet) -> None:
        old.select_nodes({REPLACED_LABEL: "true"})
        old.wait_until_gone()  # two proxies would compete for the same rules and ports
        new.select_nodes({REPLACED_LABEL: None})
        new.wait_for_rollout()

    def _roll_out(self, config_map: str) -> None:
        self._kproxy.use_config_map(VOLUME, config_map)
        self._kproxy.wait_for_rollout()

    def _files(self, config_map: str) -> dict[str, str]:
        files: dict[str, str] = self._api.get(object_path("ConfigMap", NAMESPACE, config_map))["data"]
        return files

    def _mode_of(self, node: Node) -> str:
        try:
            return self._agents.get(node.name, MODE_URL)[1].strip()
        except ConnectionError as error:
            return f"unknown: {error}"

    def _all_in(self, mode: Mode) -> bool:
        return all(self._mode_of(node) == mode for node in self._nodes)

    def _wait_for_replacement(self, node: str, is_other: Callable[[Object], bool]) -> None:
        def is_replaced() -> bool:
            try:
                return is_other(self._kproxy.pod(node))
            except LookupError:
                return False

        until(is_replaced, f"a new proxy on node {node} is ready")


def _container(pod: Object) -> str:
    """Return the ID of the pod's container, `<runtime>://<ID>`."""
    (status,) = pod["status"]["containerStatuses"]
    found: str = status.get("containerID", "")
    return found
