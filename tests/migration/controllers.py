"""What the controller manager does here: a Pod for each DaemonSet and node, none without its owner, and statuses."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor

from tests.apiserver.resources import NODES
from tests.migration.resources import DAEMON_SETS, PODS, Object
from tests.migration.store import ClusterStore, key_of

BETWEEN_LOOKS = 0.05


class Loop(ABC):
    """A thread that looks at the cluster again and again, until it is left (use it in a `with`)."""

    def __init__(self, store: ClusterStore) -> None:
        self._store = store
        self._ended = threading.Event()
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._work: Future[None] | None = None

    def __enter__(self) -> None:
        self._work = self._worker.submit(self._repeat)

    def __exit__(self, *exc: object) -> None:
        """End it, and raise what has ended it before, if anything."""
        self._ended.set()
        self._worker.shutdown()
        if self._work:
            self._work.result()

    @abstractmethod
    def look(self) -> None:
        """Do what is to be done now."""

    def _repeat(self) -> None:
        while not self._ended.wait(BETWEEN_LOOKS):
            self.look()


class DaemonSets(Loop):
    """The DaemonSet controller, and of the garbage collector what ends the Pods of a DaemonSet that was deleted."""

    def look(self) -> None:
        with self._store.changed:
            owners = self._store.all(DAEMON_SETS)
            pods = self._store.all(PODS)
            kept = {each["metadata"]["uid"] for each in owners}
            self._end([pod for pod in pods if _owner(pod) not in kept])
            for owner in owners:
                self._follow(owner, [pod for pod in pods if _owner(pod) == owner["metadata"]["uid"]])

    def _follow(self, owner: Object, pods: list[Object]) -> None:
        template = owner["spec"]["template"]
        nodes = {node["metadata"]["name"] for node in self._store.all(NODES) if fits(template["spec"], node)}
        self._end([pod for pod in pods if pod["spec"]["nodeName"] not in nodes])
        for node in sorted(nodes - {pod["spec"]["nodeName"] for pod in pods}):
            self._store.create(new_pod(owner, node))
        here = [pod for pod in pods if pod["spec"]["nodeName"] in nodes]
        self._store.set_status(owner, status(owner, len(nodes), here))

    def _end(self, pods: list[Object]) -> None:
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                self._store.end_pod(key_of(pod))


def fits(spec: Object, node: Object) -> bool:
    """Tell whether a DaemonSet's Pod goes to a node: by its selector, and by the taints that it tolerates."""
    labels = node["metadata"]["labels"]
    chosen = all(labels.get(key) == value for key, value in spec.get("nodeSelector", {}).items())
    tolerated = {each.get("key", "*") for each in spec.get("tolerations", ()) if each.get("operator") == "Exists"}
    taints = {each["key"] for each in node["spec"].get("taints", ())}
    return chosen and ("*" in tolerated or taints <= tolerated)


def new_pod(owner: Object, node: str) -> Object:
    """Return the Pod that a DaemonSet wants on a node."""
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


def status(owner: Object, wanted: int, pods: list[Object]) -> Object:
    """Return a DaemonSet's status, by its Pods on those nodes where it wants one."""
    ready = sum(is_ready(pod) for pod in pods)
    return {
        "observedGeneration": owner["metadata"]["generation"],
        "desiredNumberScheduled": wanted,
        "currentNumberScheduled": len(pods),
        "updatedNumberScheduled": sum(_revision_of(pod) == revision(owner) for pod in pods),
        "numberMisscheduled": 0,
        "numberReady": ready,
        "numberAvailable": ready,
        "numberUnavailable": wanted - ready,
    }


def revision(owner: Object) -> str:
    """Return what tells one form of a DaemonSet's Pods from another."""
    return hashlib.sha256(json.dumps(owner["spec"]["template"], sort_keys=True).encode()).hexdigest()[:10]


def is_ready(pod: Object) -> bool:
    """Tell whether a Pod's kubelet says that it is ready."""
    conditions = pod.get("status", {}).get("conditions", ())
    return any((each["type"], each["status"]) == ("Ready", "True") for each in conditions)


def _revision_of(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["controller-revision-hash"])


def _owner(pod: Object) -> str:
    return str(pod["metadata"]["ownerReferences"][0]["uid"])
