"""kproxy on a real cluster's nodes: a DaemonSet in kube-system, and kube-proxy where there is one put aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import yaml

from tests.e2e.cluster import Mode, Node, Object
from tests.e2e.real.agents import Agents
from tests.e2e.real.api import Api, place
from tests.e2e.real.daemonset import NAMESPACE, DaemonSet, in_other_mode
from tests.e2e.waiting import until

VOLUME = "config"
"""The volume of kproxy's pods with `config.conf` in it, see deploy/base."""

MODE_URL = "http://127.0.0.1:10249/proxyMode"
ASIDE = "kproxy/replaced"
"""The node label that docs/operations.md lets kube-proxy wait for, in vain."""


class RealProxies:
    """kproxy's DaemonSet."""

    def __init__(self, api: Api, agents: Agents, daemonset: str, nodes: Sequence[Node]) -> None:
        self._api, self._agents, self._nodes = api, agents, nodes
        self._kproxy = DaemonSet(api, daemonset)
        self._kube_proxy = DaemonSet(api, "kube-proxy")

    def missing(self) -> str:
        """Return why these tests make no sense on the cluster, "" if kproxy serves it."""
        if self._kproxy.found() is None:
            return f"the cluster has no DaemonSet {NAMESPACE}/{self._kproxy.name}; --e2e-daemonset names another"
        return ""

    def lacks_kube_proxy(self) -> str:
        """Return why kproxy and kube-proxy cannot be swapped, "" if they can."""
        if self._kube_proxy.found() is None:
            return f"the cluster has no DaemonSet {NAMESPACE}/kube-proxy"
        if ASIDE not in self._kube_proxy.node_selector():
            return f"DaemonSet {NAMESPACE}/kube-proxy is not put aside by the nodeSelector {ASIDE}"
        files = self._files("kube-proxy")
        mode = yaml.safe_load(files["config.conf"]).get("mode", "")
        if mode in {"iptables", "nftables"}:
            return ""
        # Without one each takes its own, and kube-proxy removes rules of another mode before it has any of its own.
        return f"kube-proxy's mode is {mode!r}, and only with iptables or nftables both are in the same one"

    def mode(self) -> Mode:
        """Return the mode that the proxies say they are in. Raises `ValueError` where they do not agree."""
        modes = {node.name: self._mode_of(node) for node in self._nodes}
        for mode in ("iptables", "nftables"):
            if set(modes.values()) == {mode}:
                return mode
        raise ValueError(f"no one mode: {modes}")

    def restart(self, node: str) -> None:
        """Delete the node's pod; return once there is another, and it is ready."""
        old = self._kproxy.pod(node)
        self._kproxy.delete_pod(old)
        self._wait_for_other(node, lambda pod: pod["metadata"]["uid"] != old["metadata"]["uid"])

    def kill(self, node: str) -> None:
        """Kill the process; return once the kubelet has started another, and it is ready."""
        old = _container(self._kproxy.pod(node))
        self._agents.kill(node, old.partition("://")[2])
        self._wait_for_other(node, lambda pod: _container(pod) != old)

    @contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Roll out a copy of the configuration with another mode, and at the end the configuration of before."""
        if self.mode() == mode:
            yield
            return
        before = self._kproxy.config_map(VOLUME)
        copy = f"{before}-e2e-{mode}"
        metadata = {"name": copy, "namespace": NAMESPACE}
        files = in_other_mode(self._files(before), mode)
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files}
        self._api.apply(place("ConfigMap", NAMESPACE, copy), body)
        try:
            self._roll_out(copy)
            until(lambda: self._all_in(mode), f"every node is in mode {mode}")
            yield
        finally:
            self._roll_out(before)
            self._api.delete(place("ConfigMap", NAMESPACE, copy))

    @contextmanager
    def replaced_by_kube_proxy(self) -> Iterator[None]:
        """Put kproxy aside as docs/operations.md does kube-proxy, so that nothing of it has to be made anew."""
        try:
            self._swap(self._kproxy, self._kube_proxy)
            yield
        finally:
            self._swap(self._kube_proxy, self._kproxy)

    def logs(self, lines: int) -> Iterator[tuple[str, str]]:
        """Yield node and last lines of each pod of kproxy's."""
        for pod in self._kproxy.pods():
            yield pod["spec"].get("nodeName", "no node"), self._kproxy.log(pod, lines)

    def _swap(self, leaving: DaemonSet, coming: DaemonSet) -> None:
        leaving.select_nodes({ASIDE: "true"})
        leaving.wait_until_gone()  # both at once would fight for the same rules and ports
        coming.select_nodes({ASIDE: None})
        coming.wait_for_rollout()

    def _roll_out(self, config_map: str) -> None:
        self._kproxy.take_config_map(VOLUME, config_map)
        self._kproxy.wait_for_rollout()

    def _files(self, config_map: str) -> dict[str, str]:
        files: dict[str, str] = self._api.get(place("ConfigMap", NAMESPACE, config_map))["data"]
        return files

    def _mode_of(self, node: Node) -> str:
        try:
            return self._agents.get(node.name, MODE_URL)[1].strip()
        except ConnectionError as error:
            return f"unknown: {error}"

    def _all_in(self, mode: Mode) -> bool:
        return all(self._mode_of(node) == mode for node in self._nodes)

    def _wait_for_other(self, node: str, is_other: Callable[[Object], bool]) -> None:
        def serves() -> bool:
            try:
                return is_other(self._kproxy.pod(node))
            except LookupError:
                return False

        until(serves, f"another proxy on node {node} is ready")


def _container(pod: Object) -> str:
    """Return the id of the pod's container, `<runtime>://<id>`."""
    (status,) = pod["status"]["containerStatuses"]
    found: str = status.get("containerID", "")
    return found
