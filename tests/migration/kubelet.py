"""The kubelet of one node: it runs Pods as processes in the node's network, with their files at their places.

Of an image it takes no more than its name: what runs is the checkout's `kproxy`, with the privileges of the tests
(tests/deploy/test_image.py is about those of the manifests). Probes are those of the manifest, but sent all the time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from urllib.request import urlopen

from tests.deploy.kubeadm import ACCOUNT
from tests.lab.namespace import Namespace
from tests.lab.proxy import KPROXY
from tests.lab.waiting import HANG_GUARD
from tests.migration.controllers import Loop
from tests.migration.rbac import token_of
from tests.migration.resources import CONFIG_MAPS, PODS, SERVICE_ACCOUNTS, Object
from tests.migration.store import ClusterStore, key_of

HIDDEN = ("/var/lib", "/run")
"""Folders of this machine that are empty for a container, so that what is mounted below them can have its place."""

SERVICE_ADDRESS = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
"""As every Pod has it. Nobody answers there."""


class Kubelet(Loop):
    """Runs the Pods of a node. `history` has each container's image when it starts ("+") and when it ends ("-")."""

    def __init__(
        self, node: str, namespace: Namespace, store: ClusterStore, folder: Path, is_awaited: Callable[[str], bool]
    ) -> None:
        """`folder` has the server's certificate and gets the Pods' files and logs.

        A Pod that is to end does so when `is_awaited` says of its name that somebody waits for that: whoever
        does not wait finds it still there, as with containers that are slow to end.
        """
        super().__init__(store)
        self.node, self._namespace, self._folder, self._is_awaited = node, namespace, folder, is_awaited
        self._processes: dict[str, Popen[str]] = {}
        self.history: list[str] = []

    def running(self) -> list[str]:
        """Return the images of the containers that run now."""
        alive = {key for key, process in self._processes.copy().items() if process.poll() is None}
        return [_container(pod)["image"] for pod in self._store.all(PODS) if key_of(pod) in alive]

    def __exit__(self, *exc: object) -> None:
        """End it and everything that it runs."""
        try:
            super().__exit__(*exc)
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait(HANG_GUARD)

    def look(self) -> None:
        for pod in self._store.all(PODS):
            if pod["spec"]["nodeName"] != self.node:
                continue
            if "deletionTimestamp" in pod["metadata"]:
                if self._is_awaited(pod["metadata"]["name"]):
                    self._end(pod)
            elif key_of(pod) not in self._processes:
                self._begin(pod)
            else:
                self._tell(pod)

    def _begin(self, pod: Object) -> None:
        mounts = dict(self._mounts(pod, self._folder / pod["metadata"]["name"]))
        for first in pod["spec"].get("initContainers", ()):
            code = self._run(pod, first, mounts).wait(HANG_GUARD)
            if code:
                raise RuntimeError(f"container {first['name']} ended with exit code {code}")
        only = _container(pod)
        self._processes[key_of(pod)] = self._run(pod, only, mounts)
        self.history.append(f"+ {only['image']}")

    def _run(self, pod: Object, container: Object, mounts: dict[str, Path]) -> Popen[str]:
        script = ["set -e", *(f"mount -t tmpfs tmpfs {place}" for place in HIDDEN)]
        for place in (*(each["mountPath"] for each in container["volumeMounts"]), ACCOUNT):
            if source := mounts.get(place):
                make, options = ("mkdir -p", "bind,ro") if source.is_dir() else ("touch", "bind")
                script += [f"{make} {place}", f"mount -o {options} {shlex.quote(str(source))} {place}"]
        environment = SERVICE_ADDRESS | variables(pod, container)
        settings = [f"{name}={value}" for name, value in environment.items()]
        inside = ["sh", "-c", "\n".join([*script, 'exec "$@"']), "sh", *command(container, environment)]
        with (self._folder / f"{pod['metadata']['name']}.log").open("a") as log:
            return self._namespace.popen(["env", *settings, "unshare", "--mount", *inside], log)

    def _mounts(self, pod: Object, folder: Path) -> Iterator[tuple[str, Path]]:
        """Write a Pod's files; return where they belong, and where they are."""
        namespace, spec = pod["metadata"]["namespace"], pod["spec"]
        account = self._store.get(SERVICE_ACCOUNTS, f"{namespace}/{spec['serviceAccountName']}")
        certificate = (self._folder / "server.crt").read_text()
        yield ACCOUNT, _written(folder / "account", {"token": token_of(account), "ca.crt": certificate})
        places = {each["name"]: each["mountPath"] for each in _container(pod)["volumeMounts"]}
        for volume in spec["volumes"]:
            place = places[volume["name"]]
            if "configMap" in volume:
                content = self._store.get(CONFIG_MAPS, f"{namespace}/{volume['configMap']['name']}")["data"]
                yield place, _written(folder / volume["name"], content)
            elif volume["hostPath"].get("type") == "FileOrCreate":
                file = self._folder / f"{self.node}{volume['hostPath']['path'].replace('/', '-')}"
                file.touch()
                yield place, file

    def _tell(self, pod: Object) -> None:
        """Write a Pod's status: it is ready if it runs and all of its probes are answered."""
        container = _container(pod)
        probes = [container[name] for name in ("startupProbe", "readinessProbe") if name in container]
        runs = self._processes[key_of(pod)].poll() is None
        ready = runs and all(self._is_answered(url(each, container)) for each in probes)
        condition = {"type": "Ready", "status": str(ready)}
        self._store.set_status(pod, {"phase": "Running" if runs else "Failed", "conditions": [condition]})

    def _is_answered(self, where: str) -> bool:
        def ask() -> bool:
            try:
                with urlopen(where, timeout=HANG_GUARD) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        return self._namespace.call(ask)

    def _end(self, pod: Object) -> None:
        if process := self._processes.get(key_of(pod)):
            process.terminate()
            code = process.wait(pod["metadata"]["deletionGracePeriodSeconds"])
            self.history.append(f"{'-' if code == 0 else code} {_container(pod)['image']}")
        self._store.delete(PODS, key_of(pod))


def command(container: Object, environment: dict[str, str]) -> list[str]:
    """Return what a container runs: for kube-proxy, whose program is not here, kproxy with its command line."""
    if container["image"].startswith("registry.k8s.io/kube-proxy:"):
        words = ["run", *container["command"][1:]]
    else:
        words = container["args"]
    return [KPROXY, *(re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in words)]


def variables(pod: Object, container: Object) -> dict[str, str]:
    """Return the variables that a container's manifest sets."""
    fields = {"spec.nodeName": pod["spec"]["nodeName"]}
    return {each["name"]: fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in container["env"]}


def url(probe: Object, container: Object) -> str:
    """Return what a probe asks for."""
    asked = probe["httpGet"]
    port = next(each["containerPort"] for each in container["ports"] if each["name"] == asked["port"])
    return f"http://{asked['host']}:{port}{asked['path']}"


def _container(pod: Object) -> Object:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def _written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder
