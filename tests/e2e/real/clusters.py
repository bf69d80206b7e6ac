"""The real cluster of the session, with a namespace for each test."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.real.agents import Agents
from tests.e2e.real.api import NODES, Api, object_path
from tests.e2e.real.cluster import Access, ClusterFacts, RealCluster
from tests.e2e.real.execution import Executor
from tests.e2e.real.namespaces import create_namespace, delete_namespace, is_gone
from tests.e2e.real.objects import dual_stack_trial, usable_nodes
from tests.e2e.real.proxies import RealProxies
from tests.e2e.waiting import until

MAX_NODES = 3
"""The maximum number of nodes that tests use."""

MAX_NAME_LENGTH = 63


class UnsuitableClusterError(Exception):
    """The cluster cannot be tested."""


class RealClusters:
    """The cluster of a kubeconfig."""

    def __init__(self, kubeconfig: str, image: str, daemonset: str) -> None:
        """`image` is for the test pods. Raises the errors of `Api`, and `UnsuitableClusterError`."""
        self._api = Api(kubeconfig)
        executor = Executor(self._api.configuration)
        self._session = secrets.token_hex(3)
        self._used: list[str] = []
        agents_namespace = f"kproxy-e2e-{self._session}-nodes"
        self._agents = Agents(self._api, executor, agents_namespace, image)
        self._access = Access(self._api, executor, self._agents, image)
        all_nodes = self._api.items(NODES)
        nodes = usable_nodes(all_nodes)[:MAX_NODES]
        if not nodes:
            raise UnsuitableClusterError(f"none of the cluster's {len(all_nodes)} nodes is ready and schedulable")
        self._proxies = RealProxies(self._api, self._agents, daemonset, nodes)
        if reason := self._proxies.missing():
            raise UnsuitableClusterError(reason)
        trial = self._api.create(object_path("Service", "default"), dual_stack_trial(), dry_run=True)
        addresses = {each["address"] for node in all_nodes for each in node["status"]["addresses"]}
        self._facts = ClusterFacts(nodes, trial["spec"]["ipFamilies"], addresses, self._dns())

    def __enter__(self) -> RealClusters:
        return self

    def __exit__(self, *_: object) -> None:
        self._agents.close()
        for name in self._used:
            until(is_gone(self._api, name), f"namespace {name} is gone")

    @contextmanager
    def test(self, name: str) -> Iterator[RealCluster]:
        """Yield the cluster with a namespace for one test, which is deleted afterwards."""
        prefix = f"kproxy-e2e-{self._session}-{len(self._used)}-"
        own = (prefix + name)[:MAX_NAME_LENGTH].rstrip("-")
        self._used.append(own)
        create_namespace(self._api, own)
        cluster = RealCluster(self._access, self._proxies, self._facts, own)
        try:
            yield cluster
        finally:
            cluster.close()
            delete_namespace(self._api, own)  # `__exit__` waits for it: no other test uses this name

    def _dns(self) -> str:
        """Return the ClusterIP of the cluster's DNS, "" without one."""
        for service in self._api.items(object_path("Service", "kube-system"), labelSelector="k8s-app=kube-dns"):
            address: str = service["spec"].get("clusterIP", "")
            if address not in {"", "None"}:
                return address
        return ""
