"""A real etcd and kube-apiserver on loopback, with the interface of `tests.apiserver`.

The environment variable KUBEBUILDER_ASSETS must name a folder with `etcd` and `kube-apiserver`, as controller-runtime's
envtest lays it out. Written for kube-apiserver 1.30 to 1.36.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from tests.apiserver import ConflictError, NotFoundError
from tests.apiserver.resources import RESOURCES, Resource, resource_of
from tests.ports import free_port

ASSETS = "KUBEBUILDER_ASSETS"
TOKEN = "kproxy-tests"
START_TIMEOUT = 120.0
MAINTAINED = {("default", "kubernetes"), ("", "kubernetes")}
"""Objects that kube-apiserver itself maintains: its Service and EndpointSlice, and the ServiceCIDR of its flags."""

Object = dict[str, Any]


def unavailable() -> str:
    """Return why no real server can be started, in one line, or "" if one can."""
    folder = os.environ.get(ASSETS)
    if not folder:
        return f"{ASSETS} is not set"
    missing = [name for name in ("etcd", "kube-apiserver") if not (Path(folder) / name).is_file()]
    return f"{ASSETS}={folder} has no {' and no '.join(missing)}" if missing else ""


class Etcd:
    """One etcd member with its data in `folder`."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._program, self._folder = program, folder
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [
            str(self._program),
            "--name=tests",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=tests={self._peer}",
        ]
        self._process = _spawn(arguments, self._folder / "etcd.log")
        _wait_until(self._healthy, self._process, self._folder / "etcd.log")

    def stop(self) -> None:
        _terminate(self._process)

    def compact(self) -> None:
        """Compact to the current revision, through the HTTP gateway of the v3 API."""
        # Any read returns the current revision, even of a missing key. Keys are base64.
        revision = self._post("kv/range", {"key": base64.b64encode(b"k").decode()})["header"]["revision"]
        self._post("kv/compaction", {"revision": revision, "physical": True})

    def _healthy(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return str(json.load(answer)["health"]) == "true"

    def _post(self, path: str, body: Object) -> Any:
        request = urllib.request.Request(f"{self.url}/v3/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


class KubeApiServer:
    """etcd and kube-apiserver. They start slowly: share one server between tests, and `clear` it before each."""

    def __init__(self, folder: Path) -> None:
        assets = Path(os.environ[ASSETS])
        self._program, self._folder = assets / "kube-apiserver", folder
        self.address = ("127.0.0.1", free_port())
        self.etcd = Etcd(assets / "etcd", folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._namespaces: set[str] = set()
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE

    def __enter__(self) -> KubeApiServer:
        (self._folder / "tokens.csv").write_text(f'{TOKEN},tests,tests,"system:masters"\n')
        key = ["openssl", "genrsa", "-out", str(self._folder / "account.key"), "2048"]
        subprocess.run(key, check=True, capture_output=True)
        self.etcd.start()
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.etcd.stop()

    @property
    def url(self) -> str:
        return f"https://{self.address[0]}:{self.address[1]}"

    def start(self) -> None:
        """Start kube-apiserver, on the same port and data as before."""
        key = self._folder / "account.key"
        arguments = [
            str(self._program),
            f"--etcd-servers={self.etcd.url}",
            f"--bind-address={self.address[0]}",
            f"--advertise-address={self.address[0]}",
            f"--secure-port={self.address[1]}",
            f"--cert-dir={self._folder / 'certificates'}",
            f"--token-auth-file={self._folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
        ]
        self._process = _spawn(arguments, self._folder / "kube-apiserver.log")
        _wait_until(self._ready, self._process, self._folder / "kube-apiserver.log")

    def stop(self) -> None:
        """Stop kube-apiserver; etcd keeps the objects."""
        _terminate(self._process)

    def kubeconfig(self, path: Path, *, port: int | None = None, token: str | None = None) -> Path:
        """Write a kubeconfig for this server, or for a relay's `port` in front of it."""
        cluster = {"server": f"https://127.0.0.1:{port or self.address[1]}", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token or TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(config))
        return path

    def create(self, body: Object) -> Object:
        resource = resource_of(body["apiVersion"], body["kind"])
        namespace = body["metadata"].get("namespace", "default")
        if resource.namespaced:
            self._ensure_namespace(namespace)
        created: Object = self._request("POST", resource.object_path(namespace), body)
        return created

    def update(self, body: Object) -> Object:
        present = self._request("GET", _path_of(body), None)["metadata"]["resourceVersion"]
        sent = body | {"metadata": body["metadata"] | {"resourceVersion": present}}
        updated: Object = self._request("PUT", _path_of(body), sent)
        return updated

    def apply(self, body: Object) -> Object:
        """Create the object, or replace an existing one."""
        try:
            return self.update(body)
        except NotFoundError:
            return self.create(body)

    def delete(self, body: Object) -> None:
        self._request("DELETE", _path_of(body), None)

    def compact(self) -> None:
        """Drop the history: watches and lists that resume from older versions get status 410.

        Restarts kube-apiserver, which has a history of its own.
        """
        self.etcd.compact()
        self.stop()
        self.start()

    def clear(self) -> None:
        """Delete all Services, EndpointSlices, Nodes and ServiceCIDRs except the server's own."""
        for resource in RESOURCES:
            if resource.kind not in {"Service", "EndpointSlice", "Node", "ServiceCIDR"}:
                continue
            for item in self._items(resource):
                metadata = item["metadata"]
                namespace = metadata.get("namespace", "")
                if (namespace, metadata["name"]) not in MAINTAINED:
                    self._delete_if_exists(resource, namespace, metadata["name"])

    def _items(self, resource: Resource) -> list[Object]:
        try:
            items: list[Object] = self._request("GET", resource.path, None)["items"]
        except NotFoundError:  # ServiceCIDRs are new in 1.33
            return []
        return items

    def _delete_if_exists(self, resource: Resource, namespace: str, name: str) -> None:
        with suppress(NotFoundError):  # an EndpointSlice that was deleted with its Service
            self._request("DELETE", resource.object_path(namespace, name), None)

    def _ensure_namespace(self, name: str) -> None:
        if name not in self._namespaces:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            with suppress(ConflictError):  # exists from an earlier start, or is built in
                self._request("POST", "/api/v1/namespaces", body)
            self._namespaces.add(name)

    def _ready(self) -> bool:
        return self._read("GET", "/readyz", None) == b"ok"

    def _request(self, method: str, path: str, body: Object | None) -> Any:
        try:
            return json.loads(self._read(method, path, body))
        except HTTPError as error:
            text = error.read().decode(errors="replace")
            if error.code == 404:
                raise NotFoundError(path) from None
            problem = ConflictError if error.code == 409 else RuntimeError
            raise problem(f"{method} {path}: {error.code} {text}") from None

    def _read(self, method: str, path: str, body: Object | None) -> bytes:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as answer:
            content: bytes = answer.read()
            return content


def _path_of(body: Object) -> str:
    resource = resource_of(body["apiVersion"], body["kind"])
    return resource.object_path(body["metadata"].get("namespace", "default"), body["metadata"]["name"])


def _spawn(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(arguments, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    last = "no answer"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if ready():
                return
        except (URLError, OSError, ValueError, KeyError) as error:
            last = str(error)
        time.sleep(0.1)  # nothing signals that the process is ready
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{process.args!r} did not start ({last}):\n{tail}")


def _terminate(process: subprocess.Popen[bytes] | None) -> None:
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
