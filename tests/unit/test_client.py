"""The HTTP client of the API server: credentials from every source, their reload, TLS, and what a client imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kproxy import __version__
from kproxy.kube.client.client import ROTATION_PERIOD, ApiClient
from kproxy.kube.client.cluster_access import ClientError, ClusterAccess
from kproxy.kube.client.response import TransportError
from tests.apiserver import ApiServer
from tests.clock import Clock
from tests.lab.waiting import HANG_GUARD
from tests.unit.client_fixtures import (
    EMPTY_OBJECT,
    SERVICES,
    ScriptedServer,
    accesses,
    authorizations,
    base64_of,
    certificates,
    client_error,
    exec_credential,
    get,
    kubeconfig,
    python_plugin,
    reload_before_every_request,
    server,
    server_context,
    service_account,
    set_service_address,
    token_plugin,
    write_service_account,
)

__all__ = ["accesses", "certificates", "server", "service_account"]


@pytest.fixture
def config(tmp_path: Path, server: ApiServer) -> str:
    """Write a kubeconfig for the server. Return its path."""
    return kubeconfig(tmp_path / "config", server.url, {"token": "secret"})


def test_get_request(server: ApiServer, config: str) -> None:
    client = ApiClient.from_config(config)
    status, body = get(client, limit="500", labelSelector="!a,!b")
    assert (status, len(json.loads(body)["items"])) == (200, 1)
    (request,) = server.requests.all()
    assert request.query == {"limit": "500", "labelSelector": "!a,!b"}
    assert request.headers["Authorization"] == "Bearer secret"
    assert request.headers["User-Agent"] == f"kproxy/{__version__}"
    assert request.headers["Accept"] == "application/json"
    client.close()


def test_post_request(server: ApiServer, config: str) -> None:
    client = ApiClient.from_config(config)
    body = json.dumps({"metadata": {"name": "e"}, "reason": "größe"}).encode()
    with client.post("/api/v1/namespaces/demo/events", body, HANG_GUARD) as response:
        assert response.status == 201
    (request,) = server.requests.all()
    assert (request.method, request.body, request.headers["Content-Type"]) == ("POST", body, "application/json")


# Token files and exec plugins


def test_token_file_is_read_again_after_a_401(tmp_path: Path, server: ApiServer) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
    with client.get(SERVICES, {}, HANG_GUARD) as rejected:
        assert rejected.status == 401
    token.write_text("secret\n")
    client.renew(rejected)
    assert get(client)[0] == 200
    token.write_text("unused")
    client.renew(rejected)  # the request had older credentials than the current ones, which stay in use
    assert get(client)[0] == 200


def test_failed_renewal_does_not_postpone_the_periodic_reload(
    tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("kproxy.kube.client.client.time", SimpleNamespace(monotonic=clock))
    token = tmp_path / "token"
    token.write_text("old")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
    clock.advance(ROTATION_PERIOD - 1)
    token.unlink()
    with pytest.raises(ClientError):
        client.renew(None)
    token.write_text("secret")
    clock.advance(1)
    assert get(client)[0] == 200


def test_token_file_is_read_again_periodically(
    tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
    reload_before_every_request(monkeypatch)
    assert get(client)[0] == 401
    token.write_text("secret")
    assert get(client)[0] == 200
    token.unlink()
    assert get(client)[0] == 200
    assert f"cannot reload the credentials, keeping the current ones: {tmp_path / 'config'}: " in caplog.text


def test_exec_plugin_runs_again_after_a_401(tmp_path: Path, server: ApiServer) -> None:
    answer = tmp_path / "answer"
    answer.write_text(exec_credential(token="old"))
    user = python_plugin(tmp_path / "plugin", f"print(open({str(answer)!r}).read())")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    with client.get(SERVICES, {}, HANG_GUARD) as rejected:
        assert rejected.status == 401
    answer.write_text(exec_credential(token="secret"))
    client.renew(rejected)
    assert get(client)[0] == 200


def test_failing_exec_plugin_is_an_error_of_one_line(tmp_path: Path, server: ApiServer) -> None:
    user = python_plugin(tmp_path / "plugin", "import sys; sys.exit('no\\nsmart card')")
    path = kubeconfig(tmp_path / "config", server.url, user)
    assert client_error(path) == f"{path}: exec: process returned 1. no smart card"


# The Pod's service account


def test_in_cluster_token_is_read_again_after_a_401(
    service_account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_service_account(service_account, "first\n", certificates / "ca.crt")
    with ApiServer(tokens=["first"], tls=server_context(certificates)) as server:
        set_service_address(monkeypatch, *server.address)
        client = ApiClient.from_config()
        assert get(client)[0] == 200
        (service_account / "token").write_text("second\n")
        server.tokens = {"second"}
        with client.get(SERVICES, {}, HANG_GUARD) as rejected:
            assert rejected.status == 401
        client.renew(rejected)
        assert get(client)[0] == 200


def test_in_cluster_token_is_read_again_periodically(
    service_account: Path,
    certificates: Path,
    accesses: list[ClusterAccess],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = service_account / "token"
    write_service_account(service_account, "first", certificates / "ca.crt")
    with ApiServer(tokens=["first", "second"], tls=server_context(certificates)) as server:
        set_service_address(monkeypatch, *server.address)
        client = ApiClient.from_config()
        token.write_text("second")
        assert get(client)[0] == 200
        reload_before_every_request(monkeypatch)
        assert get(client)[0] == 200
        token.unlink()
        assert get(client)[0] == 200
        assert authorizations(server) == ["Bearer first", "Bearer second", "Bearer second"]
        assert len(accesses) == 2
        assert accesses[1].pool is accesses[0].pool, "a new token does not require new connections"
    prefix = "cannot reload the credentials, keeping the current ones: in-cluster service account: "
    assert f"{prefix}{token}: No such" in caplog.text


def test_in_cluster_certificate_authority_is_read_again_periodically(
    service_account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_service_account(service_account, "token", certificates / "client.crt")
    with ApiServer(tls=server_context(certificates)) as server:
        set_service_address(monkeypatch, *server.address)
        client = ApiClient.from_config()
        with pytest.raises(TransportError, match="certificate"):
            get(client)
        write_service_account(service_account, "token", certificates / "ca.crt")
        reload_before_every_request(monkeypatch)
        assert get(client)[0] == 200


def test_missing_service_account_is_an_error(service_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "in-cluster service account"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert client_error() == f"{source}: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set"
    set_service_address(monkeypatch, "fd00::1", 443)
    assert client_error() == f"{source}: {service_account / 'token'}: No such file or directory"


# Servers and TLS


def test_server_without_kubeconfig_and_server_that_overrides_it(server: ApiServer, tmp_path: Path) -> None:
    assert get(ApiClient.from_config(None, server.url))[0] == 401
    path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", {"token": "secret"})
    assert get(ApiClient.from_config(path, server.url + "/"))[0] == 200


@pytest.mark.parametrize("inline", [True, False])
def test_client_certificates(tmp_path: Path, certificates: Path, inline: bool) -> None:
    with ApiServer(tls=server_context(certificates, require_client=True)) as server:
        if inline:
            cluster = {"certificate-authority-data": base64_of(certificates / "ca.crt")}
            user = {
                "client-certificate-data": base64_of(certificates / "client.crt"),
                "client-key-data": base64_of(certificates / "client.key"),
            }
        else:
            cluster = {"certificate-authority": str(certificates / "ca.crt")}
            user = {
                "client-certificate": str(certificates / "client.crt"),
                "client-key": str(certificates / "client.key"),
            }
        path = tmp_path / "config"
        assert get(ApiClient.from_config(kubeconfig(path, server.url, user, cluster)))[0] == 200
        with pytest.raises(TransportError):
            get(ApiClient.from_config(kubeconfig(path, server.url, {}, cluster)))


def test_server_certificates_are_verified(tmp_path: Path, certificates: Path) -> None:
    authority = {"certificate-authority": str(certificates / "ca.crt")}
    path = tmp_path / "config"
    with ApiServer(tls=server_context(certificates, "named")) as server:
        with pytest.raises(TransportError, match="certificate"):
            get(ApiClient.from_config(kubeconfig(path, server.url)))
        with pytest.raises(TransportError, match=r"127\.0\.0\.1"):
            get(ApiClient.from_config(kubeconfig(path, server.url, {}, authority)))
        named = authority | {"tls-server-name": "kube.example"}
        assert get(ApiClient.from_config(kubeconfig(path, server.url, {}, named)))[0] == 200
        insecure = {"insecure-skip-tls-verify": True}
        assert get(ApiClient.from_config(kubeconfig(path, server.url, {}, insecure)))[0] == 200


def test_proxy_url_of_the_kubeconfig(tmp_path: Path) -> None:
    with ScriptedServer([EMPTY_OBJECT]) as proxy:
        cluster = {"proxy-url": proxy.url}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {}, cluster))
        assert get(client, "/version") == (200, b"{}")
    assert proxy.requests[0].startswith(b"GET http://kube.invalid:8080/version ")


# Errors in kubeconfigs


@pytest.mark.parametrize("users", [[{"name": "test", "user": {"token": "secret"}}], [], None])
def test_missing_user_is_an_error(tmp_path: Path, users: list[Any] | None) -> None:
    path = Path(kubeconfig(tmp_path / "config", "https://127.0.0.1:1"))
    content = json.loads(path.read_text())
    content["contexts"][0]["context"]["user"] = "missing"
    path.write_text(json.dumps(content | {"users": users}))
    message = f"{path}: the current context refers to user 'missing', which does not exist"
    assert client_error(str(path)).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "empty"),
        (b"a: [", "while parsing"),
        (b"[]", "list"),
        (b"\xff\xfe\x00", ""),
        (b"{}", "Expected key current-context"),
    ],
)
def test_unusable_kubeconfig_is_an_error_of_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_bytes(content)
    error = client_error(str(path))
    assert error.startswith(f"{path}: ")
    assert message in error


def test_missing_home_directory_is_an_error_of_one_line() -> None:
    assert client_error("~no-such-user/config") == "~no-such-user/config: No such file or directory"


@pytest.mark.parametrize("address", ["10.0.0.1:6443", "ftp://x", "https://", "http://x:99999", "http://[::1"])
def test_server_must_be_an_http_url(tmp_path: Path, address: str) -> None:
    with pytest.raises(ClientError, match=r"server: must be a URL such as https://10\.0\.0\.1:6443, not '"):
        ApiClient.from_config(None, address)
    with pytest.raises(ClientError, match=str(tmp_path)):
        ApiClient.from_config(kubeconfig(tmp_path / "config", address))


def test_errors_name_the_file_of_unusable_credentials(tmp_path: Path, certificates: Path) -> None:
    (tmp_path / "garbage").write_text("no certificate")

    def error(user: dict[str, Any], cluster: dict[str, Any]) -> str:
        return client_error(kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user, cluster))

    assert str(tmp_path / "garbage") in error({}, {"certificate-authority": "garbage"})
    assert "missing.crt" in error({}, {"certificate-authority": "missing.crt"})
    assert error({}, {"certificate-authority-data": "%%%"}).startswith(str(tmp_path / "config"))
    certificate = str(certificates / "client.crt")
    encrypted = {"client-certificate": certificate, "client-key": str(certificates / "encrypted.key")}
    assert "encrypted.key" in error(encrypted, {})
    mismatched = {"client-certificate": certificate, "client-key": str(certificates / "server.key")}
    assert "server.key" in error(mismatched, {})
    assert "No such file" in error({"tokenFile": "missing"}, {})


# Imports


def imported_by(program: str, *names: str) -> set[str]:
    """Return which of these packages and modules a program has imported when it exits."""
    source = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    modules = done.stdout.split()
    return {name for name in names if any(f"{module}.".startswith(f"{name}.") for module in modules)}


def program_with_client(config: str) -> str:
    """Return a program that sends one request."""
    return (
        "from kproxy.kube.client.client import ApiClient\n"
        f"client = ApiClient.from_config({config!r}); assert client.get({SERVICES!r}, {{}}, 20).read()"
    )


def test_client_does_not_import_the_codec() -> None:
    modules = "kproxy.kube.client.client, kproxy.kube.client.plugin_access"
    assert imported_by(f"import {modules}", "kproxy.kube.codec") == set()


def test_http_packages_are_imported_only_when_a_client_is_created() -> None:
    assert imported_by("import kproxy.app.daemon", "kubernetes", "urllib3") == set()


def test_static_credentials_do_not_import_the_kubernetes_package(server: ApiServer, config: str) -> None:
    assert imported_by(program_with_client(config), "kubernetes", "requests", "urllib3") == {"urllib3"}


def test_plugin_credentials_import_no_api_classes_or_models(server: ApiServer, tmp_path: Path) -> None:
    config = kubeconfig(tmp_path / "config", server.url, token_plugin(tmp_path / "plugin", "secret"))
    heavy = ("kubernetes.client.models.v1_service", "kubernetes.client.api.core_v1_api")
    assert imported_by(program_with_client(config), "kubernetes", *heavy) == {"kubernetes"}
