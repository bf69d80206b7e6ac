"""A real API server, given by a kubeconfig: creates the benchmark's objects there, changes and deletes them."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec
import yaml

from kproxy.kube.client.client import ApiClient
from tests.apiserver.relay import Relay
from tests.apiserver.resources import resource_of
from tests.bench.cluster import Cluster, Object
from tests.bench.watchlog import WatchTraffic
from tests.lab.namespace import Namespace

THREADS = 8
TIMEOUT = 60.0
"""Seconds without an answer after which a request fails."""

PORTS = {"https": 443, "http": 80}
MANAGER = "kproxy-bench"
_FILES = ("certificate-authority", "client-certificate", "client-key", "tokenFile")


class RealApiServer:
    """The API server of a kubeconfig, reachable from a namespace through a relay. Use it as a context manager.

    All objects are in a new Namespace, except a new Node. They are deleted at the end, also after an error. Cluster IPs
    are allocated by the server. Raises `RuntimeError` if the server rejects a request.
    """

    def __init__(self, kubeconfig: str, namespace: Namespace) -> None:
        self.node_name = self._namespace = f"kproxy-bench-{uuid.uuid4().hex[:8]}"
        self._client = ApiClient.from_config(kubeconfig)
        self._config, self._cluster = _minified(Path(kubeconfig))
        target = urlsplit(self._client.server)
        port = target.port or PORTS[target.scheme]
        self._target = target
        self._relay = Relay(
            (target.hostname or "", port),
            listen=lambda number: namespace.call(lambda: socket.create_server(("127.0.0.1", number), backlog=64)),
        )
        self.url = f"{target.scheme}://127.0.0.1:{self._relay.port}"
        self._created: dict[str, Object] = {}
        self._cluster_ips: dict[str, str] = {}
        self._changed = 0

    def __enter__(self) -> Self:
        self._create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self._namespace}})
        return self

    def __exit__(self, *_: object) -> None:
        *namespaced, first = reversed(self._created)  # the Namespace was created first
        self._each(self._delete, namespaced)
        self._delete(first)
        self._relay.__exit__()
        self._client.close()

    def kubeconfig(self) -> Object:
        """Return the content of a kubeconfig for this server, for processes in the network namespace."""
        more = {"server": self.url}
        if self._target.scheme == "https" and not self._cluster.get("insecure-skip-tls-verify"):
            more["tls-server-name"] = self._cluster.get("tls-server-name") or self._target.hostname or ""
        self._config["clusters"][0]["cluster"] = self._cluster | more
        return self._config

    def cluster_ip(self, number: int) -> str:
        """Return the cluster IP of a Service of the cluster."""
        return self._cluster_ips[f"service-{number}"]

    def load(self, cluster: Cluster) -> None:
        """Create all objects of a cluster, except the ServiceCIDR, which is the server's own."""
        self._each(self._create, [self._own(each) for each in cluster.objects() if each["kind"] != "ServiceCIDR"])

    def change(self, *, put: Sequence[Object] = (), delete: Sequence[Object] = ()) -> None:
        """Create or replace objects, then delete others, one after the other."""
        self._changed = time.monotonic_ns()
        for body in map(self._own, put):
            path = _path(body)
            if path in self._created:
                self._send("PUT", path, body)
            else:
                self._create(body)
        for body in map(self._own, delete):
            self._delete(_path(body))

    def drain_traffic(self) -> WatchTraffic:
        """Return the time directly before the last change, as that of its events. Nothing else is known."""
        return WatchTraffic(first=self._changed, last=self._changed)

    def _own(self, body: Object) -> Object:
        """Return an object as the benchmark creates it: in its Namespace, and ignored by the cluster's controllers."""
        metadata = {"name": body["metadata"]["name"], "labels": dict(body["metadata"].get("labels", {}))}
        own = body | {"metadata": metadata}
        if body["kind"] == "Node":
            metadata["name"] = self.node_name
            taints = [{"key": MANAGER, "effect": effect} for effect in ("NoSchedule", "NoExecute")]
            return own | {"spec": {"unschedulable": True, "taints": taints}}
        metadata["namespace"] = self._namespace
        if body["kind"] == "Service":  # with a selector, the EndpointSlice controller would create slices
            absent = ("selector", "clusterIP", "clusterIPs")
            return own | {"spec": {key: value for key, value in body["spec"].items() if key not in absent}}
        metadata["labels"]["endpointslice.kubernetes.io/managed-by"] = MANAGER
        return own

    def _create(self, body: Object) -> None:
        path = _path(body)
        self._created[path] = body  # the server may have created it even if there is no response
        created = self._send("POST", path.rpartition("/")[0], body)
        if body["kind"] == "Service":
            self._cluster_ips[body["metadata"]["name"]] = created["spec"].get("clusterIP", "")

    def _delete(self, path: str) -> None:
        self._send("DELETE", path, None, accepted=(404,))
        self._created.pop(path, None)

    def _each(self, function: Any, items: Iterable[Any]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _send(self, method: str, path: str, body: Object | None, *, accepted: Sequence[int] = ()) -> Any:
        content = None if body is None else msgspec.json.encode(body)
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        with self._client._send(method, path, TIMEOUT, headers, content) as response:
            answer = response.read()
            status = response.status
        if status >= 300 and status not in accepted:
            try:
                reason = msgspec.json.decode(answer)["message"]
            except (msgspec.DecodeError, LookupError, TypeError):
                reason = "no message"
            raise RuntimeError(f"{method} {path}: the API server returned {status}: {reason}")
        return msgspec.json.decode(answer)


def _path(body: Object) -> str:
    metadata = body["metadata"]
    return resource_of(body["apiVersion"], body["kind"]).object_path(metadata.get("namespace", ""), metadata["name"])


def _minified(kubeconfig: Path) -> tuple[Object, Object]:
    """Return the current context of a kubeconfig as a kubeconfig with absolute paths, and its cluster."""
    content = yaml.safe_load(kubeconfig.read_text())

    def named(kind: str, name: str) -> Object:
        found: Object = next(each[kind] or {} for each in content[f"{kind}s"] if each["name"] == name)
        return {key: str(kubeconfig.parent / value) if key in _FILES else value for key, value in found.items()}

    context = named("context", content["current-context"])
    cluster = named("cluster", context["cluster"])
    user = named("user", context["user"]) if context.get("user") else {}
    minified = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "bench", "cluster": cluster}],
        "users": [{"name": "bench", "user": user}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "current-context": "bench",
    }
    return minified, cluster
