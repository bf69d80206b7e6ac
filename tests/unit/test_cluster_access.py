"""Access to the API server with static credentials and through the `kubernetes` package.

Most tests run with both, because a kubeconfig means the same to both: tokens, proxies, certificates and errors.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError, ClusterAccess, StaticAccess, StaticConfig, find_static_config
from kproxy.kube.client.plugin_access import PluginAccess
from kproxy.kube.client.response import TransportError
from kproxy.model.delta import BASIC_KINDS
from kproxy.model.types import ServiceCIDR
from tests.apiserver import ApiServer
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
    get,
    issue,
    kubeconfig,
    reload_before_every_request,
    self_signed,
    server,
    server_context,
    service_account,
    set_service_address,
    token_plugin,
    write_service_account,
)

__all__ = ["accesses", "certificates", "server", "service_account"]

UNREACHABLE = "http://127.0.0.1:1"


def disable_static_access(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients use the `kubernetes` package for all credentials."""
    monkeypatch.setattr("kproxy.kube.client.client.find_static_config", lambda *_, **__: None)


@pytest.fixture(params=[StaticAccess, PluginAccess], ids=["static", "plugin"])
def _each_access(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, accesses: list[ClusterAccess]
) -> Iterator[None]:
    """Run the test once with each type of access, and check afterwards that the test's clients used no other."""
    if request.param is PluginAccess:
        disable_static_access(monkeypatch)
    yield
    assert {type(access) for access in accesses} <= {request.param}


with_each_access = pytest.mark.usefixtures("_each_access")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# Choice between static credentials and the kubernetes package


@pytest.mark.parametrize("user", [{"username": "me", "password": "secret"}, {"as": "", "token": "secret"}])
def test_other_credentials_need_the_kubernetes_package(server: ApiServer, tmp_path: Path, user: dict[str, Any]) -> None:
    path = kubeconfig(tmp_path / "config", server.url, user)
    assert find_static_config(path, None, {}) is None
    get(ApiClient.from_config(path))
    scheme = "Bearer" if "token" in user else "Basic"
    assert server.requests.all()[0].headers["Authorization"].startswith(scheme)


def test_servers_behind_a_proxy_need_the_kubernetes_package(tmp_path: Path) -> None:
    config = kubeconfig(tmp_path / "config", "https://10.0.5.1:6443", {"token": "secret"})
    proxy = {"https_proxy": "http://proxy.example:3128"}
    assert find_static_config(config, None, {}) is not None
    assert find_static_config(config, None, proxy) is None
    assert find_static_config(config, None, proxy | {"NO_PROXY": "10.0.0.0/8"}) is not None
    assert find_static_config(config, "https://127.0.0.1:6443", proxy) is not None
    assert find_static_config(None, "https://10.0.5.1:6443", proxy) is None


class UnreadableEnvironment(dict[str, str]):
    """Environment variables that must not be read."""

    def __getitem__(self, name: str) -> str:
        raise AssertionError(f"{name} was read")

    def get(self, name: str, default: object = None) -> Any:
        raise AssertionError(f"{name} was read")

    def __contains__(self, name: object) -> bool:
        raise AssertionError(f"{name} was read")


def test_static_credentials_depend_only_on_the_given_environment(
    service_account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (service_account / "token").write_text("token-of-pod")
    (service_account / "ca.crt").write_text("")
    (tmp_path / "key").write_text("token-of-user")
    kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {"tokenFile": "key"})
    environment = {"HOME": str(tmp_path), "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    with_proxy = environment | {"HTTPS_PROXY": "http://proxy.example:3128"}
    password_database = SimpleNamespace(getpwuid=lambda _: SimpleNamespace(pw_dir=str(tmp_path)))
    monkeypatch.setattr("kproxy.kube.client.cluster_access.pwd", password_database)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", UnreadableEnvironment())
        in_home = find_static_config("~/config", None, environment)
        without_home = find_static_config("~/config", None, {})
        in_cluster = find_static_config(None, None, environment)
        assert find_static_config("~/config", None, with_proxy) is None
        with pytest.raises(ClientError, match="KUBERNETES_SERVICE_PORT are not set"):
            find_static_config(None, None, {})
    assert in_home == without_home
    assert in_home and in_cluster  # noqa: PT018 - for the type checker
    assert (in_home.server, in_home.token) == ("https://192.0.2.1:6443", "token-of-user")
    assert (in_cluster.server, in_cluster.token) == ("https://10.96.0.1:443", "token-of-pod")


@pytest.mark.parametrize("user", [{"token": "secret"}, {"tokenFile": "token"}, {}])
def test_requests_have_the_same_headers_with_each_access(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: dict[str, Any]
) -> None:
    (tmp_path / "token").write_text("secret\n")
    path = kubeconfig(tmp_path / "config", f"{server.url}/", user)
    get(ApiClient.from_config(path))
    disable_static_access(monkeypatch)
    get(ApiClient.from_config(path))
    static, plugin = (request.headers for request in server.requests.all())
    assert dict(static) == dict(plugin)


# Tokens


def test_token_file_overrides_a_token(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    user = {"tokenFile": "token", "token": "old"}
    assert get(ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user)))[0] == 200


@with_each_access
@pytest.mark.parametrize("user", [{"token": "secret\n"}, {"tokenFile": "token"}])
def test_white_space_around_a_token_is_removed(server: ApiServer, tmp_path: Path, user: dict[str, Any]) -> None:
    (tmp_path / "token").write_text(" secret\r\n\n")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    assert get(client)[0] == 200
    assert authorizations(server) == ["Bearer secret"]


INVALID_TOKENS = [
    "top\nsecret",
    "top secret",
    "top\x00secret",
    "top\x7fsecret",
    "top\u2028secret",
    "tôp-secret",
    "\ufeffsecret",
]


@with_each_access
@pytest.mark.parametrize("token", INVALID_TOKENS)
def test_invalid_token_is_rejected_without_showing_it(tmp_path: Path, token: str) -> None:
    path = tmp_path / "config"
    (tmp_path / "token").write_text(token)
    reason = "the token contains characters other than visible ASCII"
    assert client_error(kubeconfig(path, UNREACHABLE, {"token": token})) == f"{path}: token: {reason}"
    assert client_error(kubeconfig(path, UNREACHABLE, {"tokenFile": "token"})) == f"{path}: {tmp_path}/token: {reason}"


def test_invalid_token_of_a_plugin_is_rejected_without_showing_it(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "config", UNREACHABLE, token_plugin(tmp_path / "plugin", "a\nb"))
    assert client_error(path) == f"{path}: credentials: the token contains characters other than visible ASCII"


def test_transport_errors_do_not_show_headers(
    server: ApiServer, tmp_path: Path, accesses: list[ClusterAccess], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"token": "secret"}))
    for value in ("Bearer top-secret\n", "Bearer top-s\u20accret"):
        monkeypatch.setattr(accesses[-1], "auth_headers", {"Authorization": value})
        with pytest.raises(TransportError, match=r"^connection failed with (Value|UnicodeEncode)Error$"):
            get(client)


def test_errors_of_the_kubernetes_package_do_not_show_the_user(tmp_path: Path) -> None:
    provider = {"name": "oidc", "config": {"client-secret": "hidden"}}
    error = client_error(kubeconfig(tmp_path / "config", UNREACHABLE, {"auth-provider": provider}))
    assert "id-token" in error
    assert "hidden" not in error


@with_each_access
def test_empty_token_file_does_not_replace_the_current_token(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    user = {"tokenFile": "token", "token": "other"}
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    assert get(client)[0] == 200
    reload_before_every_request(monkeypatch)
    for content in ("", "\n"):
        token.write_text(content)
        assert get(client)[0] == 200
    assert authorizations(server) == ["Bearer secret"] * 3
    assert (
        f"cannot reload the credentials, keeping the current ones: {tmp_path}/config: {token}: the token is empty"
        in caplog.text
    )


@with_each_access
def test_empty_in_cluster_token_file_does_not_replace_the_current_token(
    service_account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_service_account(service_account, "secret", certificates / "ca.crt")
    reload_before_every_request(monkeypatch)
    with ApiServer(tokens=["secret", "next"], tls=server_context(certificates)) as server:
        set_service_address(monkeypatch, *server.address)
        client = ApiClient.from_config()
        for content in ("secret", "", "next"):
            (service_account / "token").write_text(content)
            assert get(client)[0] == 200
        assert [str(value).split()[1] for value in authorizations(server)] == ["secret", "secret", "next"]
    assert "cannot reload the credentials, keeping the current ones: in-cluster service account: " in caplog.text


def test_kubernetes_package_does_not_reload_the_in_cluster_token(
    service_account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_service_account(service_account, "secret", certificates / "ca.crt")
    set_service_address(monkeypatch, "127.0.0.1", 1)
    days = (datetime(2030, 1, 1) + timedelta(days=number) for number in itertools.count())
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda: next(days)), timedelta=timedelta)
    monkeypatch.setattr("kubernetes.config.incluster_config.datetime", clock)
    access = PluginAccess(None, None)
    (service_account / "token").write_text("")
    assert access.auth_headers == {"Authorization": "bearer secret"}


@with_each_access
def test_empty_token_file_name_is_unset(server: ApiServer, tmp_path: Path, accesses: list[ClusterAccess]) -> None:
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "", "token": "secret"}))
    assert get(client)[0] == 200
    assert not accesses[-1].rotates
    assert get(ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": ""})))[0] == 401
    assert authorizations(server) == ["Bearer secret", None]


@with_each_access
def test_token_is_used_until_its_file_exists(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.tokens = {"secret", "newer"}
    user = {"tokenFile": "token", "token": "secret"}
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    token = tmp_path / "token"
    assert f"{token}: No such file or directory; using the kubeconfig's token instead" in caplog.text
    assert get(client)[0] == 200
    reload_before_every_request(monkeypatch)
    token.write_text("newer")
    assert get(client)[0] == 200
    token.unlink()
    assert get(client)[0] == 200
    assert authorizations(server) == ["Bearer secret", "Bearer newer", "Bearer newer"]


IMPERSONATIONS: list[dict[str, Any]] = [
    {"as": "system:kube-proxy"},
    {"as-groups": ["system:nodes"]},
    {"as-uid": "1"},
    {"as-user-extra": {"reason": ["test"]}},
]


@pytest.mark.parametrize("impersonation", IMPERSONATIONS)
def test_impersonation_is_rejected(tmp_path: Path, impersonation: dict[str, Any]) -> None:
    path = kubeconfig(tmp_path / "config", UNREACHABLE, {"token": "secret"} | impersonation)
    assert client_error(path) == f"{path}: user: {next(iter(impersonation))}: impersonation is not supported"


# Certificate authorities of the system


@pytest.mark.parametrize(("scheme", "expected"), [("https", 1), ("HTTPS", 1), ("http", 0), ("HTTP", 0)])
def test_certificate_authorities_of_the_system_are_loaded_only_for_https(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, expected: int
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.crt"))
    monkeypatch.setenv("SSL_CERT_DIR", "/nonexistent")
    pool = StaticAccess(StaticConfig("test", f"{scheme}://kube.example:6443")).pool
    assert pool.connection_pool_kw["ssl_context"].cert_store_stats()["x509_ca"] == expected


# Proxies


def test_no_proxy_does_not_apply_to_the_proxy_url_of_the_kubeconfig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    with ScriptedServer([EMPTY_OBJECT]) as proxy:
        cluster = {"proxy-url": proxy.url}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {}, cluster))
        assert get(client, "/version") == (200, b"{}")
    assert proxy.requests[0].startswith(b"GET http://kube.invalid:8080/version ")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_proxy_of_the_environment_with_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with ScriptedServer([EMPTY_OBJECT]) as proxy:
        monkeypatch.setenv(variable, proxy.url.replace("://", "://me:s%20t@"))
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {"token": "secret"}))
        assert get(client, "/version") == (200, b"{}")
    assert proxy.requests[0].startswith(b"GET http://kube.invalid:8080/version ")
    assert b"\r\nproxy-authorization: basic bwu6cyb0\r\n" in proxy.requests[0].lower()


@with_each_access
@pytest.mark.parametrize("environment", [{}, {"NO_PROXY": "10.0.0.0/8"}, {"NO_PROXY": "*"}, {"no_proxy": "localhost"}])
def test_loopback_servers_do_not_use_the_proxy_of_the_environment(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), UNREACHABLE)
    for name, value in (proxies | environment).items():
        monkeypatch.setenv(name, value)
    for host in ("127.0.0.1", "localhost"):
        url = f"http://{host}:{server.address[1]}"
        clients = [
            ApiClient.from_config(kubeconfig(tmp_path / "config", url, {"token": "secret"})),
            ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid", {"token": "secret"}), url),
            ApiClient.from_config(None, url),
        ]
        assert [get(client)[0] for client in clients] == [200, 200, 401]


@with_each_access
def test_in_cluster_loopback_server_does_not_use_the_proxy_of_the_environment(
    service_account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_service_account(service_account, "secret", certificates / "ca.crt")
    monkeypatch.setenv("HTTPS_PROXY", UNREACHABLE)
    with ApiServer(tokens=["secret"], tls=server_context(certificates)) as server:
        set_service_address(monkeypatch, *server.address)
        assert get(ApiClient.from_config())[0] == 200


@with_each_access
def test_no_proxy_applies_to_a_socks_proxy_of_the_environment(
    tmp_path: Path, accesses: list[ClusterAccess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socks", None)
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1")
    path = kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {"token": "secret"})
    assert client_error(path).startswith(f"{path}: a SOCKS proxy requires")
    monkeypatch.setenv("NO_PROXY", ".invalid:8080")
    ApiClient.from_config(path)
    assert len(accesses) == 1


def test_socks_proxy_without_pysocks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socks", None)
    cluster = {"proxy-url": "socks5://127.0.0.1:1"}
    path = kubeconfig(tmp_path / "config", "http://kube.invalid", {}, cluster)
    assert client_error(path) == f"{path}: a SOCKS proxy requires the Python package PySocks, which is not installed"


def test_socks_proxy_with_pysocks(tmp_path: Path) -> None:
    (tmp_path / "socks.py").write_text("PROXY_TYPE_SOCKS4, PROXY_TYPE_SOCKS5 = 1, 2\n")
    path = kubeconfig(tmp_path / "config", "http://kube.invalid", {}, {"proxy-url": "socks5://127.0.0.1:1"})
    program = (
        "import sys; from kproxy.kube.client.plugin_access import PluginAccess; "
        "print(PluginAccess(sys.argv[1], None).pool)"
    )
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert "SOCKSProxyManager" in done.stdout


# Connections and certificates


@with_each_access
def test_all_threads_can_keep_their_connections(
    server: ApiServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"token": "secret"}))
    threads = len((*BASIC_KINDS, ServiceCIDR)) + 1  # one for each kind of object, and one for events
    responses = [client.get(SERVICES, {}, HANG_GUARD) for _ in range(threads)]
    for response in responses:
        with response:
            response.read()
    assert caplog.messages == [], "urllib3 has discarded a connection"


@with_each_access
@pytest.mark.parametrize("inline", [True, False])
def test_certificate_authority_without_verification_is_rejected(
    certificates: Path, tmp_path: Path, inline: bool
) -> None:
    file = certificates / "ca.crt"
    name = "certificate-authority-data" if inline else "certificate-authority"
    cluster: dict[str, Any] = {name: base64_of(file) if inline else str(file), "insecure-skip-tls-verify": True}
    path = kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {}, cluster)
    assert client_error(path) == f"{path}: cluster: {name} and insecure-skip-tls-verify are mutually exclusive"


@with_each_access
def test_any_certificate_is_accepted_without_verification(certificates: Path, tmp_path: Path) -> None:
    with ApiServer(tls=server_context(certificates, "named")) as server:
        path = kubeconfig(tmp_path / "config", server.url, {}, {"insecure-skip-tls-verify": True})
        assert get(ApiClient.from_config(path))[0] == 200


@pytest.fixture(scope="session")
def intermediate(certificates: Path) -> Path:
    """Create an intermediate authority `intermediate`, and a certificate `leaf` that it signed for 127.0.0.1."""
    issue(certificates, "intermediate", "ca", "basicConstraints=critical,CA:true")
    issue(certificates, "leaf", "intermediate", "subjectAltName=IP:127.0.0.1")
    return certificates


@with_each_access
def test_intermediate_certificate_authority_is_sufficient(intermediate: Path, tmp_path: Path) -> None:
    with ApiServer(tls=server_context(intermediate, "leaf")) as server:
        cluster = {"certificate-authority": str(intermediate / "intermediate.crt")}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {}, cluster))
        assert get(client)[0] == 200
        cluster = {"certificate-authority": str(intermediate / "client.crt")}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {}, cluster))
        with pytest.raises(TransportError, match="certificate"):
            get(client)


def copy_key_pair(directory: Path, source: str, target: Path) -> None:
    for suffix in (".crt", ".key"):
        target.with_suffix(suffix).write_bytes((directory / f"{source}{suffix}").read_bytes())


@with_each_access
def test_client_certificate_files_are_read_again_periodically(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reload_before_every_request(monkeypatch)
    self_signed(certificates, "untrusted")
    current = tmp_path / "current"
    copy_key_pair(certificates, "untrusted", current)
    user = {"client-certificate": "current.crt", "client-key": "current.key"}
    cluster = {"certificate-authority": str(certificates / "ca.crt")}
    with ApiServer(tls=server_context(certificates, require_client=True)) as server:
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user, cluster))
        with pytest.raises(TransportError):
            get(client)
        copy_key_pair(certificates, "client", current)
        assert get(client)[0] == 200
        for suffix in (".crt", ".key"):
            current.with_suffix(suffix).unlink()
        client.close()
        assert get(client)[0] == 200, "new connections use the current certificate while its files are missing"


@pytest.mark.parametrize("field", ["certificate-authority", "client-certificate"])
def test_exec_plugin_runs_again_only_after_certificate_files_have_changed(
    tmp_path: Path,
    certificates: Path,
    accesses: list[ClusterAccess],
    monkeypatch: pytest.MonkeyPatch,
    field: str,
) -> None:
    """A client first has a file that does not work with the server, and then one that does."""
    user, cluster = token_plugin(tmp_path / "plugin", "secret"), {"certificate-authority": str(certificates / "ca.crt")}
    rotated = tmp_path / "rotated.crt"
    if field == "certificate-authority":
        shutil.copy(certificates / "client.crt", rotated)
        cluster[field] = str(rotated)
    else:
        self_signed(tmp_path, "rotated")
        user |= {"client-certificate": str(rotated), "client-key": str(tmp_path / "rotated.key")}
    reload_before_every_request(monkeypatch)
    with ApiServer(
        tokens=["secret"], tls=server_context(certificates, require_client=field == "client-certificate")
    ) as server:
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user, cluster))
        for _ in range(2):
            with pytest.raises(TransportError):
                get(client)
        assert len(accesses) == 1
        if field == "certificate-authority":
            shutil.copy(certificates / "ca.crt", rotated)
        else:
            shutil.copy(certificates / "client.key", tmp_path / "rotated.key")
            shutil.copy(certificates / "client.crt", rotated)
        for _ in range(2):
            assert get(client)[0] == 200
        assert len(accesses) == 2


@with_each_access
def test_certificate_authority_of_a_kubeconfig_is_read_again(
    tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = tmp_path / "ca.crt"
    shutil.copy(certificates / "client.crt", authority)
    reload_before_every_request(monkeypatch)
    with ApiServer(tokens=["secret"], tls=server_context(certificates)) as server:
        path = kubeconfig(
            tmp_path / "config", server.url, {"token": "secret"}, {"certificate-authority": str(authority)}
        )
        client = ApiClient.from_config(path)
        with pytest.raises(TransportError, match="certificate"):
            get(client)
        shutil.copy(certificates / "ca.crt", authority)
        assert get(client)[0] == 200


LOAD_AND_STOP = """
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

Loading(Config(), None, None, None, own_log=None).run()
"""
"""A daemon that loads a kubeconfig, prints the number of temporary files and receives SIGTERM."""


def test_temporary_key_files_are_deleted_when_the_daemon_stops(certificates: Path, tmp_path: Path) -> None:
    user = {
        "client-certificate-data": base64_of(certificates / "client.crt"),
        "client-key-data": base64_of(certificates / "client.key"),
    }
    # The kubernetes package writes inline certificates to temporary files; a proxy URL requires the package.
    path = kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user, {"proxy-url": UNREACHABLE})
    directory = tmp_path / "temporary"
    directory.mkdir()
    command = [sys.executable, "-c", LOAD_AND_STOP, path, str(directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"TMPDIR": str(directory)})
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert not list(directory.iterdir())
