"""Find out with a few requests whether kproxy can work with the API server that it is configured to use."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec

from kproxy.diagnose.facts import ApiFacts, NodeObject
from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import IN_CLUSTER, ClientError
from kproxy.kube.client.http_proxy import http_proxy_for
from kproxy.kube.client.response import ApiResponse, TransportError

OK = 200
DEADLINE_SECONDS = 1.3
"""How long all requests together may take. After that, the server counts as unreachable."""
_CONNECT_SECONDS = 0.9
_READ_SECONDS = 2.0
_MAX_NODES = 500
"""Maximum number of Nodes among which a Node with an address of this machine is searched."""


class ApiInquiry:
    """Asks the API server in a thread of its own, so that other facts can be gathered meanwhile."""

    def __init__(
        self, kubeconfig: str | None, server: str | None, node_name: str, own_addresses: Collection[str]
    ) -> None:
        """Prepare the inquiry about a Node.

        The parameters `kubeconfig` and `server` are those of `ApiClient.from_config`. `own_addresses` are the addresses
        of this machine.
        """
        in_cluster = not (kubeconfig or server)
        configured = not in_cluster or bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
        # What is known so far. Any thread may read it.
        self._facts = ApiFacts(
            source=(kubeconfig or server or IN_CLUSTER) if configured else "",
            in_cluster=configured and in_cluster,
            host=os.environ.get("KUBERNETES_SERVICE_HOST", "") if in_cluster else "",
        )
        self._kubeconfig, self._server, self._node_name = kubeconfig, server, node_name
        self._own_addresses = own_addresses
        self._thread = threading.Thread(target=self._run, name="api-inquiry", daemon=True) if configured else None
        self._deadline = 0.0

    def start(self) -> None:
        """Start to send requests, unless no API server is configured."""
        self._deadline = time.monotonic() + DEADLINE_SECONDS
        if self._thread:
            self._thread.start()

    def result(self) -> ApiFacts:
        """Return what the server has answered. Waits for it until `DEADLINE_SECONDS` after the start."""
        if self._thread:
            self._thread.join(max(0.0, self._deadline - time.monotonic()))
        facts = self._facts
        if self._thread and self._thread.is_alive() and not facts.answered:
            return msgspec.structs.replace(facts, problem=f"no answer within {DEADLINE_SECONDS:g} s", slow=True)
        return facts

    def _run(self) -> None:
        try:
            client = ApiClient.from_config(self._kubeconfig, self._server)
        except (ClientError, OSError) as error:
            self._add(problem=str(error))
            return
        parts = urlsplit(client.server)
        self._add(server=client.server, host=parts.hostname or "")
        try:
            self._connect(client.server)
            self._ask(client)
        except (TransportError, ClientError) as error:
            if not self._facts.answered:
                self._add(problem=str(error))
        except OSError as error:
            self._add(problem=error.strerror or str(error) or "timed out")
        except Exception as error:  # noqa: BLE001 - whatever the server sends, the other checks must be reported
            self._add(problem=f"unexpected answer: {error!r}", answered=False)

    def _connect(self, server: str) -> None:
        """Fail early if the server cannot be reached directly. Raises `OSError`."""
        if http_proxy_for(server, os.environ):
            return
        parts = urlsplit(server)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()

    def _ask(self, client: ApiClient) -> None:
        name = {"fieldSelector": f"metadata.name={self._node_name}"}
        nodes = self._list(client, "/api/v1/nodes", name, "nodes")
        if nodes is not None:
            node = next((found for found in map(_node, nodes) if found.name == self._node_name), None)
            self._add(node=node, node_missing=node is None)
        selector = {"fieldSelector": "metadata.name=kubernetes"}
        services = self._list(client, "/api/v1/namespaces/default/services", selector, "services")
        self._add(kubernetes_ips=_cluster_ips(services or ()))
        self._list(
            client, "/apis/discovery.k8s.io/v1/endpointslices", {"limit": "1"}, "endpointslices.discovery.k8s.io"
        )
        if self._facts.node_missing:
            found = map(_node, self._list(client, "/api/v1/nodes", {"limit": str(_MAX_NODES)}, "nodes") or ())
            own = set(self._own_addresses)
            self._add(similar=tuple(sorted(node.name for node in found if own.intersection(node.addresses))))

    def _list(
        self, client: ApiClient, path: str, parameters: Mapping[str, str], resource: str
    ) -> list[dict[str, Any]] | None:
        """Return the items of a list, or None if the server did not send any list."""
        with client.get(path, parameters, _READ_SECONDS) as response:
            if not self._facts.answered:
                self._add(answered=True, clock_offset=_clock_offset(response))
            if response.status in {401, 403}:
                denied = f"list {resource}: {response.status}"
                self._add(denied=tuple(dict.fromkeys([*self._facts.denied, denied])))
            elif response.status != OK:
                self._add(failed=(*self._facts.failed, f"list {resource}: {response.status}"))
            if response.status != OK:
                return None
            try:
                items = json.loads(response.read())["items"]
            except (ValueError, LookupError, TypeError):
                return None
            return [item for item in items or () if isinstance(item, dict)]

    def _add(self, **fields: Any) -> None:
        self._facts = msgspec.structs.replace(self._facts, **fields)


def _clock_offset(response: ApiResponse) -> float | None:
    try:
        return time.time() - parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (LookupError, ValueError, TypeError):
        return None


def _node(item: Mapping[str, Any]) -> NodeObject:
    addresses = (item.get("status") or {}).get("addresses") or ()
    spec = item.get("spec") or {}
    return NodeObject(
        name=str((item.get("metadata") or {}).get("name")),
        addresses=tuple(str(each.get("address")) for each in addresses if each.get("type") == "InternalIP"),
        pod_cidrs=tuple(map(str, spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else ()))),
    )


def _cluster_ips(services: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    for item in services:
        if (item.get("metadata") or {}).get("name") == "kubernetes":
            spec = item.get("spec") or {}
            return tuple(map(str, spec.get("clusterIPs") or [spec.get("clusterIP")]))
    return ()
