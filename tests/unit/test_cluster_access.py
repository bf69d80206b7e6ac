"""What both ways to the API server make of a kubeconfig and its credentials: tokens, refusals, proxies, authorities."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError, StaticAccess
from kproxy.kube.client.plugin_access import PluginAccess
from kproxy.kube.client.response import TransportError
from kproxy.model.delta import BASIC_KINDS
from kproxy.model.types import ServiceCIDR
from tests.apiserver import ApiServer
from tests.unit.test_client import (
    account,
    certificates,
    encoded,
    get,
    kubeconfig,
    openssl,
    plugin,
    scripted,
    server,
    server_context,
)

__all__ = ["account", "certificates", "server"]

WAYS = {"plain": StaticAccess, "package": PluginAccess}
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let all clients take this way to the server."""
    if request.param == "package":
        monkeypatch.setattr("kproxy.kube.client.client.find_static_config", lambda *_, **__: None)
    return str(request.param)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def sent(server: ApiServer) -> list[str | None]:
    return [seen.headers.get("Authorization") for seen in server.requests.all()]


def refusal(path: str) -> str:
    """Return why no client is made."""
    with pytest.raises(ClientError) as caught:
        ApiClient.from_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("user", [{"token": "secret\n"}, {"tokenFile": "token"}])
def test_white_space_around_a_token_does_not_count(
    way: str, server: ApiServer, tmp_path: Path, user: dict[str, Any]
) -> None:
    (tmp_path / "token").write_text(" secret\r\n\n")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    assert type(client._access) is WAYS[way]
    assert get(client)[0] == 200
    assert sent(server) == ["Bearer secret"]


UNUSABLE = [
    "top\nsecret",
    "top secret",
    "top\x00secret",
    "top\x7fsecret",
    "top\u2028secret",
    "tôp-secret",
    "\ufeffsecret",
]


@pytest.mark.parametrize("token", UNUSABLE)
def test_a_token_that_no_header_can_carry_is_not_shown(way: str, tmp_path: Path, token: str) -> None:
    path = tmp_path / "config"
    (tmp_path / "token").write_text(token)
    why = "the token contains characters other than visible ASCII"
    assert refusal(kubeconfig(path, "http://127.0.0.1:1", {"token": token})) == f"{path}: token: {why}"
    assert refusal(kubeconfig(path, "http://127.0.0.1:1", {"tokenFile": "token"})) == f"{path}: {tmp_path}/token: {why}"


def test_a_plugins_token_that_no_header_can_carry_is_not_shown(tmp_path: Path) -> None:
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "a\nb"}}
    user = plugin(tmp_path / "plugin", f"print({json.dumps(json.dumps(answer))})")
    path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", user)
    assert refusal(path) == f"{path}: credentials: the token contains characters other than visible ASCII"


def test_no_error_shows_a_header(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"token": "secret"}))
    for value in ("Bearer top-secret\n", "Bearer top-s\u20accret"):
        headers = {"Authorization": value}
        monkeypatch.setattr(client._access, "auth_headers", headers)
        with pytest.raises(TransportError, match=r"^connection failed with (Value|UnicodeEncode)Error$"):
            get(client)


def test_no_error_of_the_package_quotes_the_user(tmp_path: Path) -> None:
    provider = {"name": "oidc", "config": {"client-secret": "hidden"}}
    path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", {"auth-provider": provider})
    said = refusal(path)
    assert "id-token" in said
    assert "hidden" not in said


def test_an_empty_token_file_replaces_no_good_token(
    way: str,
    server: ApiServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    user = {"tokenFile": "token", "token": "other"}
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    assert get(client)[0] == 200
    monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
    for content in ("", "\n"):
        token.write_text(content)
        assert get(client)[0] == 200
    assert sent(server) == ["Bearer secret"] * 3
    assert (
        f"cannot reload the credentials, keeping the current ones: {tmp_path}/config: {token}: the token is empty"
        in caplog.text
    )
    assert type(client._access) is WAYS[way]


def test_an_empty_token_file_of_a_pod_replaces_no_good_token(
    way: str,
    account: Path,
    certificates: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token, authority = account / "token", account / "ca.crt"
    token.write_text("secret")
    authority.write_bytes((certificates / "ca.crt").read_bytes())
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(authority))
    monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
    with ApiServer(tokens=["secret", "next"], tls=server_context(certificates)) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.address[1]))
        client = ApiClient.from_config()
        for content in ("secret", "", "next"):
            token.write_text(content)
            assert get(client)[0] == 200
        assert [str(value).split()[1] for value in sent(server)] == ["secret", "secret", "next"]
    assert "cannot reload the credentials, keeping the current ones: in-cluster service account: " in caplog.text
    assert type(client._access) is WAYS[way]


def test_a_token_of_a_pod_is_kept_until_all_is_read_again(
    account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = account / "token"
    token.write_text("secret")
    days = (datetime(2030, 1, 1) + timedelta(days=number) for number in itertools.count())
    calendar = SimpleNamespace(datetime=SimpleNamespace(now=lambda: next(days)), timedelta=timedelta)
    monkeypatch.setattr("kubernetes.config.incluster_config.datetime", calendar)
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(certificates / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    access = PluginAccess(None, None)
    token.write_text("")
    assert access.auth_headers == {"Authorization": "bearer secret"}


def test_an_empty_name_of_a_token_file_is_none(way: str, server: ApiServer, tmp_path: Path) -> None:
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "", "token": "secret"}))
    assert get(client)[0] == 200
    assert not client._access.rotates
    assert type(client._access) is WAYS[way]
    assert get(ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": ""})))[0] == 401
    assert sent(server) == ["Bearer secret", None]


def test_a_token_stands_in_for_a_file_that_was_never_there(
    way: str, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.tokens = {"secret", "newer"}
    user = {"tokenFile": "token", "token": "secret"}
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    token = tmp_path / "token"
    assert f"{token}: No such file or directory; using the kubeconfig's token instead" in caplog.text
    assert get(client)[0] == 200
    monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
    token.write_text("newer")
    assert get(client)[0] == 200
    token.unlink()
    assert get(client)[0] == 200
    assert sent(server) == ["Bearer secret", "Bearer newer", "Bearer newer"]
    assert type(client._access) is WAYS[way]


IMPERSONATIONS: list[dict[str, Any]] = [
    {"as": "system:kube-proxy"},
    {"as-groups": ["system:nodes"]},
    {"as-uid": "1"},
    {"as-user-extra": {"reason": ["test"]}},
]


@pytest.mark.parametrize("asked", IMPERSONATIONS)
def test_impersonation_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", {"token": "secret"} | asked)
    assert refusal(path) == f"{path}: user: {next(iter(asked))}: impersonation is not supported"


@pytest.mark.parametrize("inline", [True, False])
def test_an_authority_that_is_not_to_be_asked_is_refused(
    way: str, certificates: Path, tmp_path: Path, inline: bool
) -> None:
    file = certificates / "ca.crt"
    name = "certificate-authority-data" if inline else "certificate-authority"
    cluster: dict[str, Any] = {name: encoded(file) if inline else str(file), "insecure-skip-tls-verify": True}
    path = kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {}, cluster)
    assert refusal(path) == f"{path}: cluster: {name} and insecure-skip-tls-verify are mutually exclusive"


def test_without_verification_any_certificate_will_do(way: str, certificates: Path, tmp_path: Path) -> None:
    with ApiServer(tls=server_context(certificates, "named")) as server:
        path = kubeconfig(tmp_path / "config", server.url, {}, {"insecure-skip-tls-verify": True})
        assert get(ApiClient.from_config(path))[0] == 200


def test_a_proxy_of_the_kubeconfig_counts_whatever_no_proxy_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with scripted([ANSWER]) as (port, seen):
        proxy = {"proxy-url": f"http://127.0.0.1:{port}"}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {}, proxy))
        assert get(client, "/version") == (200, b"{}")
    assert seen[0].startswith(b"GET http://kube.invalid:8080/version ")


def test_a_proxy_of_the_environment_is_used(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted([ANSWER]) as (port, seen):
        monkeypatch.setenv("HTTP_PROXY", f"http://me:s%20t@127.0.0.1:{port}")
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {"token": "secret"}))
        assert get(client, "/version") == (200, b"{}")
    assert seen[0].startswith(b"GET http://kube.invalid:8080/version ")
    assert b"\r\nproxy-authorization: basic bwu6cyb0\r\n" in seen[0].lower()


DIRECT = [{}, {"NO_PROXY": "10.0.0.0/8"}, {"NO_PROXY": "*"}, {"no_proxy": "localhost"}]


@pytest.mark.parametrize("environment", DIRECT)
def test_a_server_on_this_machine_is_reached_without_a_proxy(
    way: str, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    nobody = "http://127.0.0.1:1"
    for name, value in {"HTTP_PROXY": nobody, "HTTPS_PROXY": nobody, "ALL_PROXY": nobody, **environment}.items():
        monkeypatch.setenv(name, value)
    for host in ("127.0.0.1", "localhost"):
        url = f"http://{host}:{server.address[1]}"
        clients = [
            ApiClient.from_config(kubeconfig(tmp_path / "config", url, {"token": "secret"})),
            ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid", {"token": "secret"}), url),
            ApiClient.from_config(None, url),
        ]
        assert [get(client)[0] for client in clients] == [200, 200, 401]
        assert {type(client._access) for client in clients} == {WAYS[way]}


def test_a_pods_server_on_this_machine_is_reached_without_a_proxy(
    way: str, account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, authority = account / "token", account / "ca.crt"
    token.write_text("secret")
    authority.write_bytes((certificates / "ca.crt").read_bytes())
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(authority))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    with ApiServer(tokens=["secret"], tls=server_context(certificates)) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.address[1]))
        client = ApiClient.from_config()
        assert get(client)[0] == 200
        assert type(client._access) is WAYS[way]


def test_no_proxy_counts_for_a_socks_proxy_of_the_environment(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socks", None)
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1")
    path = kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {"token": "secret"})
    assert refusal(path).startswith(f"{path}: a SOCKS proxy requires")
    monkeypatch.setenv("NO_PROXY", ".invalid:8080")
    assert type(ApiClient.from_config(path)._access) is WAYS[way]


def test_a_socks_proxy_without_what_it_needs_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socks", None)
    proxy = {"proxy-url": "socks5://127.0.0.1:1"}
    path = kubeconfig(tmp_path / "config", "http://kube.invalid", {}, proxy)
    assert refusal(path) == f"{path}: a SOCKS proxy requires the Python package PySocks, which is not installed"


def test_a_socks_proxy_with_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "socks.py").write_text("PROXY_TYPE_SOCKS4, PROXY_TYPE_SOCKS5 = 1, 2\n")
    path = kubeconfig(tmp_path / "config", "http://kube.invalid", {}, {"proxy-url": "socks5://127.0.0.1:1"})
    program = (
        "import sys; from kproxy.kube.client.client import ApiClient; "
        "print(ApiClient.from_config(sys.argv[1])._access.pool)"
    )
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert "SOCKSProxyManager" in done.stdout


def test_there_is_room_for_the_connections_of_all_threads(
    way: str, server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"token": "secret"}))
    one_for_each_kind_and_for_events = len((*BASIC_KINDS, ServiceCIDR)) + 1
    answers = [client.get("/api/v1/services", {}, 20.0) for _ in range(one_for_each_kind_and_for_events)]
    for answer in answers:
        with answer:
            answer.read()
    assert caplog.messages == []
    assert type(client._access) is WAYS[way]


@pytest.fixture(scope="session")
def intermediate(certificates: Path) -> Path:
    """Make an intermediate authority of the CA, and of it a server certificate for 127.0.0.1."""
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    issued = [("middle", "ca", "basicConstraints=critical,CA:true"), ("below", "middle", "subjectAltName=IP:127.0.0.1")]
    for name, issuer, extension in issued:
        (certificates / "extension").write_text(f"{extension}\n")
        openssl(certificates, "req", "-new", *curve, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "csr")
        signing = ("x509", "-req", "-in", "csr", "-CA", f"{issuer}.crt", "-CAkey", f"{issuer}.key", "-CAcreateserial")
        openssl(certificates, *signing, "-extfile", "extension", "-out", f"{name}.crt")
    return certificates


def test_an_intermediate_authority_alone_will_do(way: str, intermediate: Path, tmp_path: Path) -> None:
    with ApiServer(tls=server_context(intermediate, "below")) as server:
        cluster = {"certificate-authority": str(intermediate / "middle.crt")}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {}, cluster))
        assert get(client)[0] == 200
        assert type(client._access) is WAYS[way]
        cluster = {"certificate-authority": str(intermediate / "client.crt")}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {}, cluster))
        with pytest.raises(TransportError, match="certificate"):
            get(client)


SELF_SIGNED = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=stranger")


def test_a_client_certificate_that_rotates(
    way: str, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
    openssl(certificates, "req", "-x509", *SELF_SIGNED, "-keyout", "stranger.key", "-out", "stranger.crt")
    for kind in ("crt", "key"):
        (tmp_path / f"mine.{kind}").write_bytes((certificates / f"stranger.{kind}").read_bytes())
    user = {"client-certificate": "mine.crt", "client-key": "mine.key"}
    cluster = {"certificate-authority": str(certificates / "ca.crt")}
    with ApiServer(tls=server_context(certificates, ask_client=True)) as server:
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user, cluster))
        with pytest.raises(TransportError):
            get(client)
        for kind in ("crt", "key"):
            (tmp_path / f"mine.{kind}").write_bytes((certificates / f"client.{kind}").read_bytes())
        assert get(client)[0] == 200
        assert type(client._access) is WAYS[way]
        for kind in ("crt", "key"):
            (tmp_path / f"mine.{kind}").unlink()
        client.close()
        assert get(client)[0] == 200, "the certificate in use stays, for new connections too"


def test_a_plugin_is_not_run_every_minute(tmp_path: Path, certificates: Path) -> None:
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "secret"}}
    user = plugin(tmp_path / "plugin", f"print({json.dumps(json.dumps(answer))})")
    user |= {"client-certificate": str(certificates / "client.crt"), "client-key": str(certificates / "client.key")}
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user))
    assert not client._access.rotates


ENDS = """
import os, signal, sys
from pathlib import Path
from kproxy.config import Config
from kproxy.app.daemon import Daemon
from kproxy.kube.client.client import ApiClient

class Loading(Daemon):
    def _work(self):
        ApiClient.from_config(sys.argv[1])
        print(len(list(Path(sys.argv[2]).iterdir())), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

Loading(Config(), None, None, None).run()
"""


def test_no_private_key_outlives_the_daemon(certificates: Path, tmp_path: Path) -> None:
    user = {
        "client-certificate-data": encoded(certificates / "client.crt"),
        "client-key-data": encoded(certificates / "client.key"),
    }
    cluster = {"proxy-url": "http://127.0.0.1:1"}
    path = kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user, cluster)
    folder = tmp_path / "temporary"
    folder.mkdir()
    command = [sys.executable, "-c", ENDS, path, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"TMPDIR": str(folder)})
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert not list(folder.iterdir())
