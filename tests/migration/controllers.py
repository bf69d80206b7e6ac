"""The controller manager: creates the Pods of DaemonSets, deletes orphaned Pods, and updates DaemonSet statuses."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

from tests.apiserver.resources import NODES
from tests.migration.resources import DAEMON_SETS, PODS, Object
from tests.migration.store import ClusterStore, key_of

INTERVAL = 0.05
"""Seconds between two iterations of a control loop."""


class ControlLoop(ABC):
    """A thread that reconciles the cluster repeatedly. Use it as a context manager."""

    def __init__(self, store: ClusterStore) -> None:
        self._store = store
        self._stopped = threading.Event()
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._work: Future[None] | None = None

    def __enter__(self) -> None:
        self._work = self._worker.submit(self._repeat)

    def __exit__(self, *exc: object) -> None:
        """Stop the loop. Raises the exception that ended it early, if any."""
        self._stopped.set()
        self._worker.shutdown()
        if self._work:
            self._work.result()

    @abstractmethod
    def reconcile(self) -> None:
        """Make the changes that are due now."""

    def _repeat(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self.reconcile()


class DaemonSets(ControlLoop):
    """The DaemonSet controller, and the garbage collection of Pods whose DaemonSet was deleted."""

    def reconcile(self) -> None:
        with self._store.changed:
            owners = self._store.all(DAEMON_SETS)
            pods = self._store.all(PODS)
            existing = {each["metadata"]["uid"] for each in owners}
            self._delete([pod for pod in pods if _owner(pod) not in existing])
            for owner in owners:
                self._reconcile_one(owner, [pod for pod in pods if _owner(pod) == owner["metadata"]["uid"]])

    def _reconcile_one(self, owner: Object, pods: list[Object]) -> None:
        template = owner["spec"]["template"]
        nodes = {node["metadata"]["name"] for node in self._store.all(NODES) if should_run_on(template["spec"], node)}
        self._delete([pod for pod in pods if pod["spec"]["nodeName"] not in nodes])
        for node in sorted(nodes - {pod["spec"]["nodeName"] for pod in pods}):
            self._store.create(new_pod(owner, node))
        scheduled = [pod for pod in pods if pod["spec"]["nodeName"] in nodes]
        self._store.set_status(owner, status(owner, len(nodes), scheduled))

    def _delete(self, pods: list[Object]) -> None:
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                self._store.terminate_pod(key_of(pod))


def should_run_on(spec: Object, node: Object) -> bool:
    """Return whether a DaemonSet's Pod belongs on a node, according to its node selector and tolerations."""
    labels = node["metadata"]["labels"]
    selected = all(labels.get(key) == value for key, value in spec.get("nodeSelector", {}).items())
    tolerated = {each.get("key", "*") for each in spec.get("tolerations", ()) if each.get("operator") == "Exists"}
    taints = {each["key"] for each in node["spec"].get("taints", ())}
    return selected and ("*" in tolerated or taints <= tolerated)


def new_pod(owner: Object, node: str) -> Object:
    """Return a new Pod of a DaemonSet for a node."""
    metadata, template = owner["metadata"], owner["spec"]["template"]
    reference = {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": metadata["name"], "uid": metadata["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{metadata['name']}-",
            "namespace": metadata["namespace"],
            "labels": template["metadata"]["labels"] | {"controller-revision-hash": revision(owner)},
            "ownerReferences": [reference | {"controller": True}],
        },
        "spec": template["spec"] | {"nodeName": node},
    }


def status(owner: Object, desired: int, pods: list[Object]) -> Object:
    """Return a DaemonSet's status, given the number of nodes it should run on and its Pods there."""
    ready = sum(is_ready(pod) for pod in pods)
    return {
        "observedGeneration": owner["metadata"]["generation"],
        "desiredNumberScheduled": desired,
        "currentNumberScheduled": len(pods),
        "updatedNumberScheduled": sum(_revision_of(pod) == revision(owner) for pod in pods),
        "numberMisscheduled": 0,
        "numberReady": ready,
        "numberAvailable": ready,
        "numberUnavailable": desired - ready,
    }


def revision(owner: Object) -> str:
    """Return a hash of a DaemonSet's Pod template."""
    return hashlib.sha256(json.dumps(owner["spec"]["template"], sort_keys=True).encode()).hexdigest()[:10]


def is_ready(pod: Object) -> bool:
    """Return whether a Pod has the condition Ready."""
    conditions = pod.get("status", {}).get("conditions", ())
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


def _revision_of(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["controller-revision-hash"])


def _owner(pod: Object) -> str:
    return str(pod["metadata"]["ownerReferences"][0]["uid"])
