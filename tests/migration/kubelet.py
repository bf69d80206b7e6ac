"""The kubelet of one node: runs Pods as processes in the node's network namespace, with their volumes mounted.

Images are only names: every container runs `kproxy` from the checkout, with the privileges of the tests.
tests/deploy/test_image.py covers the privileges in the manifests. Probes are those of the manifest, sent continuously.
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
from tests.migration.controllers import ControlLoop
from tests.migration.rbac import token_of
from tests.migration.resources import CONFIG_MAPS, PODS, SERVICE_ACCOUNTS, Object
from tests.migration.store import ClusterStore, key_of

HIDDEN = ("/var/lib", "/run")
"""Directories that a container sees as an empty tmpfs, so that mount points can be created below them."""

SERVICE_ADDRESS = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
"""Environment variables of every Pod. No server listens at this address."""


class Kubelet(ControlLoop):
    """Runs the Pods of a node. `history` records the image of each container when it starts ("+") and exits ("-")."""

    def __init__(
        self, node: str, namespace: Namespace, store: ClusterStore, folder: Path, is_watched: Callable[[str], bool]
    ) -> None:
        """`folder` contains the server's certificate, and receives the Pods' files and logs.

        A Pod is terminated only once `is_watched` returns True for its name, that is, once a client waits for its
        deletion. Clients that do not wait still find the Pod, as with containers that terminate slowly.
        """
        super().__init__(store)
        self.node, self._namespace, self._folder, self._is_watched = node, namespace, folder, is_watched
        self._processes: dict[str, Popen[str]] = {}
        self.history: list[str] = []

    def running(self) -> list[str]:
        """Return the images of the running containers."""
        alive = {key for key, process in self._processes.copy().items() if process.poll() is None}
        return [_container(pod)["image"] for pod in self._store.all(PODS) if key_of(pod) in alive]

    def __exit__(self, *exc: object) -> None:
        """Stop the loop and kill all containers."""
        try:
            super().__exit__(*exc)
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait(HANG_GUARD)

    def reconcile(self) -> None:
        for pod in self._store.all(PODS):
            if pod["spec"]["nodeName"] != self.node:
                continue
            if "deletionTimestamp" in pod["metadata"]:
                if self._is_watched(pod["metadata"]["name"]):
                    self._terminate(pod)
            elif key_of(pod) not in self._processes:
                self._start(pod)
            else:
                self._update_status(pod)

    def _start(self, pod: Object) -> None:
        mounts = dict(self._mounts(pod, self._folder / pod["metadata"]["name"]))
        for init_container in pod["spec"].get("initContainers", ()):
            code = self._run(pod, init_container, mounts).wait(HANG_GUARD)
            if code:
                raise RuntimeError(f"init container {init_container['name']} failed with exit code {code}")
        container = _container(pod)
        self._processes[key_of(pod)] = self._run(pod, container, mounts)
        self.history.append(f"+ {container['image']}")

    def _run(self, pod: Object, container: Object, mounts: dict[str, Path]) -> Popen[str]:
        script = ["set -e", *(f"mount -t tmpfs tmpfs {path}" for path in HIDDEN)]
        for path in (*(each["mountPath"] for each in container["volumeMounts"]), ACCOUNT):
            if source := mounts.get(path):
                make, options = ("mkdir -p", "bind,ro") if source.is_dir() else ("touch", "bind")
                script += [f"{make} {path}", f"mount -o {options} {shlex.quote(str(source))} {path}"]
        environment = SERVICE_ADDRESS | variables(pod, container)
        settings = [f"{name}={value}" for name, value in environment.items()]
        shell = ["sh", "-c", "\n".join([*script, 'exec "$@"']), "sh", *command(container, environment)]
        with (self._folder / f"{pod['metadata']['name']}.log").open("a") as log:
            return self._namespace.popen(["env", *settings, "unshare", "--mount", *shell], log)

    def _mounts(self, pod: Object, folder: Path) -> Iterator[tuple[str, Path]]:
        """Write a Pod's files; yield their mount paths and source paths."""
        namespace, spec = pod["metadata"]["namespace"], pod["spec"]
        account = self._store.get(SERVICE_ACCOUNTS, f"{namespace}/{spec['serviceAccountName']}")
        certificate = (self._folder / "server.crt").read_text()
        yield ACCOUNT, _written(folder / "account", {"token": token_of(account), "ca.crt": certificate})
        paths = {each["name"]: each["mountPath"] for each in _container(pod)["volumeMounts"]}
        for volume in spec["volumes"]:
            path = paths[volume["name"]]
            if "configMap" in volume:
                content = self._store.get(CONFIG_MAPS, f"{namespace}/{volume['configMap']['name']}")["data"]
                yield path, _written(folder / volume["name"], content)
            elif volume["hostPath"].get("type") == "FileOrCreate":
                file = self._folder / f"{self.node}{volume['hostPath']['path'].replace('/', '-')}"
                file.touch()
                yield path, file

    def _update_status(self, pod: Object) -> None:
        """Update a Pod's status: it is ready if it runs and all of its probes succeed."""
        container = _container(pod)
        probes = [container[name] for name in ("startupProbe", "readinessProbe") if name in container]
        running = self._processes[key_of(pod)].poll() is None
        ready = running and all(self._succeeds(url(each, container)) for each in probes)
        condition = {"type": "Ready", "status": str(ready)}
        self._store.set_status(pod, {"phase": "Running" if running else "Failed", "conditions": [condition]})

    def _succeeds(self, probe_url: str) -> bool:
        def request() -> bool:
            try:
                with urlopen(probe_url, timeout=HANG_GUARD) as response:
                    return bool(response.status == 200)
            except OSError:
                return False

        return self._namespace.call(request)

    def _terminate(self, pod: Object) -> None:
        if process := self._processes.get(key_of(pod)):
            process.terminate()
            code = process.wait(pod["metadata"]["deletionGracePeriodSeconds"])
            self.history.append(f"{'-' if code == 0 else code} {_container(pod)['image']}")
        self._store.delete(PODS, key_of(pod))


def command(container: Object, environment: dict[str, str]) -> list[str]:
    """Return the command of a container. A kube-proxy container runs kproxy with kube-proxy's command line."""
    if container["image"].startswith("registry.k8s.io/kube-proxy:"):
        words = ["run", *container["command"][1:]]
    else:
        words = container["args"]
    return [KPROXY, *(re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in words)]


def variables(pod: Object, container: Object) -> dict[str, str]:
    """Return the environment variables in a container's manifest."""
    fields = {"spec.nodeName": pod["spec"]["nodeName"]}
    return {each["name"]: fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in container["env"]}


def url(probe: Object, container: Object) -> str:
    """Return the URL of a probe."""
    request = probe["httpGet"]
    port = next(each["containerPort"] for each in container["ports"] if each["name"] == request["port"])
    return f"http://{request['host']}:{port}{request['path']}"


def _container(pod: Object) -> Object:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def _written(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder
