"""The session's real cluster, and a namespace of it for each test."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.real.agents import Agents
from tests.e2e.real.api import NODES, Api, place
from tests.e2e.real.cluster import Access, RealCluster, Surroundings
from tests.e2e.real.execution import Executor
from tests.e2e.real.namespaces import delete_namespace, is_gone, make_namespace
from tests.e2e.real.objects import dual_stack_trial, usable_nodes
from tests.e2e.real.proxies import RealProxies
from tests.e2e.waiting import until

MOST_NODES = 3
"""Of a large cluster, so many are used."""

LONGEST_NAME = 63


class UnfitError(Exception):
    """The cluster cannot be tested; the message says why."""


class RealClusters:
    """A cluster by its kubeconfig, for a session."""

    def __init__(self, kubeconfig: str, image: str, daemonset: str) -> None:
        """Take the image of the pods and the name of kproxy's DaemonSet. Raises what `Api` does, and `UnfitError`."""
        self._api = Api(kubeconfig)
        executor = Executor(self._api.configuration)
        self._session = secrets.token_hex(3)
        self._used: list[str] = []
        agents_namespace = f"kproxy-e2e-{self._session}-nodes"
        self._agents = Agents(self._api, executor, agents_namespace, image)
        self._access = Access(self._api, executor, self._agents, image)
        everyone = self._api.items(NODES)
        nodes = usable_nodes(everyone)[:MOST_NODES]
        if not nodes:
            raise UnfitError(f"none of the cluster's {len(everyone)} nodes is ready and takes pods")
        self._proxies = RealProxies(self._api, self._agents, daemonset, nodes)
        if reason := self._proxies.missing():
            raise UnfitError(reason)
        trial = self._api.create(place("Service", "default"), dual_stack_trial(), dry_run=True)
        addresses = {each["address"] for node in everyone for each in node["status"]["addresses"]}
        self._surroundings = Surroundings(nodes, trial["spec"]["ipFamilies"], addresses, self._dns())

    def __enter__(self) -> RealClusters:
        return self

    def __exit__(self, *_: object) -> None:
        self._agents.close()
        for name in self._used:
            until(is_gone(self._api, name), f"namespace {name} is gone")

    @contextmanager
    def test(self, name: str) -> Iterator[RealCluster]:
        """Yield the cluster with a namespace for one test, which nothing is left of."""
        beginning = f"kproxy-e2e-{self._session}-{len(self._used)}-"
        own = (beginning + name)[:LONGEST_NAME].rstrip("-")
        self._used.append(own)
        make_namespace(self._api, own)
        cluster = RealCluster(self._access, self._proxies, self._surroundings, own)
        try:
            yield cluster
        finally:
            cluster.close()
            delete_namespace(self._api, own)  # not waited for before the end: nobody else uses its name

    def _dns(self) -> str:
        """Return the ClusterIP of the cluster's DNS, "" if it has none."""
        for service in self._api.items(place("Service", "kube-system"), labelSelector="k8s-app=kube-dns"):
            address: str = service["spec"].get("clusterIP", "")
            if address not in {"", "None"}:
                return address
        return ""
