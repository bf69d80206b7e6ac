"""Kubeconfigs, certificates, credentials and servers for the tests of `kproxy.kube.client`.

Test modules import the fixtures that they use, and list them in `__all__`.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError, ClusterAccess, StaticAccess
from kproxy.kube.client.plugin_access import PluginAccess
from tests.apiserver import ApiServer
from tests.apiserver.objects import service
from tests.lab.waiting import HANG_GUARD

SERVICES = "/api/v1/services"
EMPTY_OBJECT = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
"""The HTTP response `{}`."""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def kubeconfig(
    path: Path, server: str, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None
) -> str:
    """Write a kubeconfig with these fields of the user and the cluster. Return its path."""
    config = {
        "clusters": [{"name": "test", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "test", "user": user or {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(config))
    return str(path)


def get(client: ApiClient, path: str = SERVICES, **params: str) -> tuple[int, bytes]:
    """Send a GET request. Return the status and the body."""
    with client.get(path, params, HANG_GUARD) as response:
        return response.status, response.read()


def client_error(kubeconfig: str | None = None) -> str:
    """Return the error, which must be one line, from creating a client."""
    with pytest.raises(ClientError) as caught:
        ApiClient.from_config(kubeconfig)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def authorizations(server: ApiServer) -> list[str | None]:
    """Return the Authorization header of each request that the server received."""
    return [request.headers.get("Authorization") for request in server.requests.all()]


def reload_before_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients reload credentials from files before every request."""
    monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """Run an API server with one Service, which accepts the token `secret`."""
    with ApiServer(tokens=["secret"]) as server:
        server.create(service("web", "10.96.7.1"))
        yield server


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> list[ClusterAccess]:
    """Record each `ClusterAccess` that a client loads. The last one is in use."""
    loaded: list[ClusterAccess] = []

    def recording(access_type: Callable[..., ClusterAccess]) -> Callable[..., ClusterAccess]:
        def load(*arguments: Any, **options: Any) -> ClusterAccess:
            loaded.append(access_type(*arguments, **options))
            return loaded[-1]

        return load

    monkeypatch.setattr("kproxy.kube.client.client.StaticAccess", recording(StaticAccess))
    monkeypatch.setattr("kproxy.kube.client.client.PluginAccess", recording(PluginAccess))
    return loaded


# Exec plugins


def exec_credential(**status: str) -> str:
    """Return the output of an exec plugin."""
    return json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status})


def exec_user(program: Path) -> dict[str, Any]:
    """Return the user of a kubeconfig that gets its credentials from a program."""
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program)}}


def python_plugin(path: Path, source: str) -> dict[str, Any]:
    """Write an exec plugin in Python. Return its user."""
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)
    return exec_user(path)


def token_plugin(path: Path, token: str) -> dict[str, Any]:
    """Write an exec plugin that returns this token. Return its user."""
    return python_plugin(path, f"print({exec_credential(token=token)!r})")


# The Pod's service account


@pytest.fixture
def service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory where kproxy and the `kubernetes` package expect the Pod's service account. It is empty."""
    monkeypatch.setattr("kproxy.kube.client.cluster_access.SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    return tmp_path


def write_service_account(directory: Path, token: str, authority: Path) -> None:
    """Write the token and the certificate authority of a service account."""
    (directory / "token").write_text(token)
    (directory / "ca.crt").write_bytes(authority.read_bytes())


def set_service_address(monkeypatch: pytest.MonkeyPatch, host: str, port: int) -> None:
    """Set the environment variables that contain the address of the API server in a Pod."""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))


# Certificates


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


def self_signed(directory: Path, name: str) -> None:
    """Create NAME.crt and NAME.key, a self-signed certificate."""
    options = ("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.crt")
    openssl(directory, "req", "-x509", *_NEW_KEY, *options)


def issue(directory: Path, name: str, issuer: str, extension: str) -> None:
    """Create NAME.crt and NAME.key, a certificate that ISSUER.crt signed, with one X.509 extension."""
    (directory / "extension").write_text(f"{extension}\n")
    openssl(directory, "req", "-new", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "csr")
    signing = ("x509", "-req", "-in", "csr", "-CA", f"{issuer}.crt", "-CAkey", f"{issuer}.key", "-CAcreateserial")
    openssl(directory, *signing, "-extfile", "extension", "-out", f"{name}.crt")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a certificate authority `ca` and the certificates that it signed.

    `server` is valid for 127.0.0.1, and `named` for kube.example. `client` is a client's; `encrypted.key` is its key
    with a password.
    """
    directory = tmp_path_factory.mktemp("certificates")
    self_signed(directory, "ca")
    for name, alternative in (("server", "IP:127.0.0.1"), ("named", "DNS:kube.example"), ("client", "DNS:client")):
        issue(directory, name, "ca", f"subjectAltName={alternative}")
    openssl(directory, "ec", "-in", "client.key", "-aes256", "-passout", "pass:x", "-out", "encrypted.key")
    return directory


def server_context(certificates: Path, name: str = "server", *, require_client: bool = False) -> ssl.SSLContext:
    """Return the TLS settings of a server with the certificate NAME.crt."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.crt", certificates / f"{name}.key")
    if require_client:
        context.load_verify_locations(certificates / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def base64_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


# A server with prepared responses


class ScriptedServer:
    """A server that accepts one connection, reads a request and sends the given pieces of a response one by one.

    Then it closes the connection, or with `close=False`, keeps it open and silent.
    """

    def __init__(self, pieces: list[bytes], *, close: bool = True) -> None:
        self.requests: list[bytes] = []
        self._pieces, self._close = pieces, close
        self._done = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(HANG_GUARD)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.requests.append(connection.recv(1 << 16))
            for piece in self._pieces:
                connection.sendall(piece)
            if not self._close:
                self._done.wait(HANG_GUARD)
