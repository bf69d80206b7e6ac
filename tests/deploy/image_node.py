"""A node that runs the image as a Pod of the DaemonSet would: same arguments, mounts and privileges, with runc."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from subprocess import Popen
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from tests.apiserver import ApiServer, Relay
from tests.deploy.kubeadm import ACCOUNT, CONNTRACK, config_map
from tests.deploy.oci import configuration
from tests.deploy.rendered import Object, arguments
from tests.lab.namespace import Namespace
from tests.lab.waiting import HANG_GUARD, wait_until


class ImageNode:
    """A network namespace, the host paths that Pods mount, and runc."""

    def __init__(self, root: Path, folder: Path, server: ApiServer, mode: str) -> None:
        self._root, self._folder = root, folder
        self.namespace = Namespace("node-1")
        self.namespace.run(["ip", "link", "set", "lo", "up"])
        self._relay = Relay(server.address, listen=self._listen)
        self._runs: list[tuple[str, Popen[str]]] = []
        self._mounts = self._make_mounts(mode)

    def close(self) -> None:
        for name, process in self._runs:
            self._runc("delete", "--force", name)
            process.wait(HANG_GUARD)
        self._relay.refuse()
        self.namespace.close()

    def start(self, container: Object, **environment: str) -> Popen[str]:
        """Start a container of the Pod, with additional environment variables."""
        name = f"kproxy-test-{os.getpid()}-{len(self._runs)}"
        bundle = self._folder / name
        bundle.mkdir()
        used = {item["mountPath"] for item in container["volumeMounts"]} | {ACCOUNT}
        document = configuration(
            container,
            arguments(container, "node-1"),
            root=self._root,
            mounts={path: source for path, source in self._mounts.items() if path in used},
            environment=environment,
            network=f"/proc/{os.getpid()}/fd/{self.namespace.fd}",
        )
        (bundle / "config.json").write_text(json.dumps(document))
        with (self._folder / "log").open("a") as log:
            command = ["runc", "--root", str(self._folder / "runc"), "run", "--bundle", str(bundle), name]
            process = self.namespace.popen(command, log)
        self._runs.append((name, process))
        return process

    def stop(self, process: Popen[str]) -> int:
        """Send SIGTERM to a container, as the kubelet does; return its exit code."""
        name = next(name for name, each in self._runs if each is process)
        self._runc("kill", name, str(int(signal.SIGTERM)))
        return process.wait(HANG_GUARD)

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def get(self, port: int, path: str) -> tuple[int, str]:
        """Request a page from the daemon; the status is 0 if no process listens on the port."""

        def request() -> tuple[int, str]:
            try:
                with urlopen(f"http://127.0.0.1:{port}{path}", timeout=HANG_GUARD) as response:
                    return response.status, response.read().decode()
            except HTTPError as error:
                return error.code, error.read().decode()
            except URLError:
                return 0, ""

        return self.namespace.call(request)

    def until_page(self, port: int, path: str) -> str:
        """Wait until a page is served with status 200, and return it."""
        wait_until(lambda: self.get(port, path)[0] == 200, f"status 200 of {path} on port {port}; log: {self.log()}")
        return self.get(port, path)[1]

    @property
    def server_port(self) -> int:
        return self._relay.port

    def _make_mounts(self, mode: str) -> dict[str, Path]:
        folders = {"/var/lib/kube-proxy": self._folder / "config", ACCOUNT: self._folder / "account"}
        for folder in folders.values():
            folder.mkdir()
        url = f"https://127.0.0.1:{self._relay.port}"
        for name, content in config_map(url, cluster_cidr="10.244.0.0/16", mode=mode, conntrack=CONNTRACK).items():
            (folders["/var/lib/kube-proxy"] / name).write_text(content)
        (folders[ACCOUNT] / "token").write_text("secret")
        (folders[ACCOUNT] / "ca.crt").write_bytes((self._folder / "server.crt").read_bytes())
        (self._folder / "xtables.lock").touch()
        modules = self._folder / "modules"
        modules.mkdir()
        return folders | {"/run/xtables.lock": self._folder / "xtables.lock", "/lib/modules": modules}

    def _listen(self, port: int) -> socket.socket:
        return self.namespace.call(lambda: socket.create_server(("127.0.0.1", port), backlog=64))

    def _runc(self, *words: str) -> None:
        subprocess.run(["runc", "--root", str(self._folder / "runc"), *words], capture_output=True, check=False)
