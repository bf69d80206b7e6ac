"""The HTTP client: credentials from every source, TLS, and what it makes of bytes, against real sockets."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kproxy import __version__
from kproxy.kube.client.client import ApiClient
from kproxy.kube.client.cluster_access import ClientError, find_static_config
from kproxy.kube.client.response import ApiResponse, SilenceError, TransportError
from kproxy.kube.codec.streams import split_lines
from tests.apiserver import ApiServer
from tests.apiserver.objects import endpoint_slice, service

HANG = 20.0
SERVICES = "/api/v1/services"


def kubeconfig(
    path: Path, server: str, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None
) -> str:
    config = {
        "clusters": [{"name": "test", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "test", "user": user or {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(config))
    return str(path)


def get(client: ApiClient, path: str = SERVICES, **params: str) -> tuple[int, bytes]:
    with client.get(path, params, HANG) as response:
        return response.status, response.read()


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer(tokens=["secret"]) as server:
        server.create(service("web", "10.96.7.1"))
        yield server


@pytest.fixture
def config(tmp_path: Path, server: ApiServer) -> str:
    return kubeconfig(tmp_path / "config", server.url, {"token": "secret"})


def test_a_token_and_who_is_asking(server: ApiServer, config: str) -> None:
    client = ApiClient.from_config(config)
    status, body = get(client, limit="500", labelSelector="!a,!b")
    assert (status, len(json.loads(body)["items"])) == (200, 1)
    (seen,) = server.requests.all()
    assert seen.query == {"limit": "500", "labelSelector": "!a,!b"}
    assert seen.headers["Authorization"] == "Bearer secret"
    assert seen.headers["User-Agent"] == f"kproxy/{__version__}"
    assert seen.headers["Accept"] == "application/json"
    client.close()


def test_a_token_file_that_changed_is_read_after_a_401(tmp_path: Path, server: ApiServer) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
    with client.get(SERVICES, {}, HANG) as refused:
        assert refused.status == 401
    token.write_text("secret\n")
    client.renew(refused)
    assert get(client)[0] == 200
    token.write_text("unused")
    client.renew(refused)  # the answer is older than the credentials: no reason to read them again
    assert get(client)[0] == 200


def test_a_token_file_is_read_again_in_time(
    tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
    monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
    assert get(client)[0] == 401
    token.write_text("secret")
    assert get(client)[0] == 200
    token.unlink()
    assert get(client)[0] == 200
    assert f"cannot reload the credentials, keeping the current ones: {tmp_path / 'config'}: " in caplog.text


def plugin(path: Path, text: str) -> dict[str, Any]:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(path)}}


def test_an_exec_plugin_runs_again_after_a_401(tmp_path: Path, server: ApiServer) -> None:
    (tmp_path / "answer").write_text("old")
    text = """import json, pathlib
token = (pathlib.Path(__file__).parent / "answer").read_text()
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                  "status": {"token": token}}))"""
    user = plugin(tmp_path / "plugin", text)
    client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user))
    with client.get(SERVICES, {}, HANG) as refused:
        assert refused.status == 401
    (tmp_path / "answer").write_text("secret")
    client.renew(refused)
    assert get(client)[0] == 200


def test_a_failing_exec_plugin_is_one_error(tmp_path: Path, server: ApiServer) -> None:
    user = plugin(tmp_path / "plugin", "import sys; sys.exit('no\\nsmart card')")
    path = kubeconfig(tmp_path / "config", server.url, user)
    with pytest.raises(ClientError) as caught:
        ApiClient.from_config(path)
    assert str(caught.value) == f"{path}: exec: process returned 1. no smart card"


@pytest.fixture
def account(tmp_path: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a service account where kproxy looks for it."""
    monkeypatch.setattr("kproxy.kube.client.cluster_access.SERVICE_ACCOUNT", tmp_path)
    return tmp_path


def test_in_cluster_with_a_token_that_rotates(
    account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account / "token").write_text("first\n")
    (account / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
    with ApiServer(tokens=["first"], tls=server_context(certificates)) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.address[1]))
        client = ApiClient.from_config()
        assert get(client)[0] == 200
        (account / "token").write_text("second\n")
        server.tokens = {"second"}
        with client.get(SERVICES, {}, HANG) as refused:
            assert refused.status == 401
        client.renew(refused)
        assert get(client)[0] == 200


def test_in_cluster_token_is_read_again_in_time(
    account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (account / "token").write_text("first")
    (account / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
    with ApiServer(tokens=["first", "second"], tls=server_context(certificates)) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.address[1]))
        client = ApiClient.from_config()
        connections = client._access.pool
        (account / "token").write_text("second")
        assert get(client)[0] == 200
        monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
        assert get(client)[0] == 200
        (account / "token").unlink()
        assert get(client)[0] == 200
        tokens = [seen.headers["Authorization"] for seen in server.requests.all()]
        assert tokens == ["Bearer first", "Bearer second", "Bearer second"]
        assert client._access.pool is connections
    kept = "cannot reload the credentials, keeping the current ones: in-cluster service account: "
    assert f"{kept}{account / 'token'}: No such" in caplog.text


def test_a_certificate_authority_that_rotates(
    account: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account / "token").write_text("token")
    (account / "ca.crt").write_bytes((certificates / "client.crt").read_bytes())
    with ApiServer(tls=server_context(certificates)) as server:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.address[1]))
        client = ApiClient.from_config()
        with pytest.raises(TransportError, match="certificate"):
            get(client)
        (account / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
        monkeypatch.setattr("kproxy.kube.client.client.ROTATION_PERIOD", 0.0)
        assert get(client)[0] == 200


def test_outside_a_cluster_without_a_kubeconfig(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClientError) as caught:
        ApiClient.from_config()
    where = "in-cluster service account"
    assert str(caught.value) == f"{where}: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(ClientError) as caught:
        ApiClient.from_config()
    assert str(caught.value) == f"{where}: {account / 'token'}: No such file or directory"


def test_server_alone_and_server_over_kubeconfig(server: ApiServer, tmp_path: Path) -> None:
    assert get(ApiClient.from_config(None, server.url))[0] == 401
    path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", {"token": "secret"})
    assert get(ApiClient.from_config(path, server.url + "/"))[0] == 200


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a CA, and of it a server certificate (127.0.0.1, kube.example) and a client's."""
    folder = tmp_path_factory.mktemp("certificates")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(folder, "req", "-x509", *curve, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt")
    for name, names in (("server", "IP:127.0.0.1"), ("named", "DNS:kube.example"), ("client", "DNS:client")):
        (folder / "names").write_text(f"subjectAltName={names}\n")
        openssl(folder, "req", "-new", *curve, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "csr")
        signing = ("x509", "-req", "-in", "csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(folder, *signing, "-extfile", "names", "-out", f"{name}.crt")
    openssl(folder, "ec", "-in", "client.key", "-aes256", "-passout", "pass:x", "-out", "encrypted.key")
    return folder


def server_context(certificates: Path, name: str = "server", *, ask_client: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.crt", certificates / f"{name}.key")
    if ask_client:
        context.load_verify_locations(certificates / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("inline", [True, False])
def test_client_certificates(tmp_path: Path, certificates: Path, inline: bool) -> None:
    with ApiServer(tls=server_context(certificates, ask_client=True)) as server:
        if inline:
            cluster = {"certificate-authority-data": encoded(certificates / "ca.crt")}
            user = {
                "client-certificate-data": encoded(certificates / "client.crt"),
                "client-key-data": encoded(certificates / "client.key"),
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


def test_server_certificates_are_checked(tmp_path: Path, certificates: Path) -> None:
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


def test_a_proxy_of_the_kubeconfig_is_used(tmp_path: Path) -> None:
    with scripted([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"]) as (port, sent):
        proxy = {"proxy-url": f"http://127.0.0.1:{port}"}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", "http://kube.invalid:8080", {}, proxy))
        assert get(client, "/version") == (200, b"{}")
    assert sent[0].startswith(b"GET http://kube.invalid:8080/version ")


BAD_CONFIGS: list[tuple[str | bytes | None, str]] = [
    (None, "No such file or directory"),
    (b"", "empty"),
    (b"a: [", "while parsing"),
    (b"[]", "list"),
    (b"\xff\xfe\x00", ""),
    (b"{}", "Expected key current-context"),
]
USERLESS: tuple[list[Any] | None, ...] = [{"name": "test", "user": {"token": "secret"}}], [], None
"""Users of which none is meant."""


@pytest.mark.parametrize("users", USERLESS)
def test_a_user_that_is_not_there_is_an_error(tmp_path: Path, users: list[Any] | None) -> None:
    path = Path(kubeconfig(tmp_path / "config", "https://127.0.0.1:1"))
    content = json.loads(path.read_text())
    content["contexts"][0]["context"]["user"] = "missing"
    path.write_text(json.dumps(content | {"users": users}))
    with pytest.raises(
        ClientError, match=f"^{path}: the current context refers to user 'missing', which does not exist"
    ):
        ApiClient.from_config(str(path))


@pytest.mark.parametrize(("content", "text"), BAD_CONFIGS)
def test_an_unusable_kubeconfig_is_one_line(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClientError) as caught:
        ApiClient.from_config(str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert text in said
    assert "\n" not in said


@pytest.mark.parametrize("address", ["10.0.0.1:6443", "ftp://x", "https://", "http://x:99999", "http://[::1"])
def test_a_server_that_is_no_url(tmp_path: Path, address: str) -> None:
    with pytest.raises(ClientError, match=r"server: must be a URL such as https://10\.0\.0\.1:6443, not '"):
        ApiClient.from_config(None, address)
    with pytest.raises(ClientError, match=str(tmp_path)):
        ApiClient.from_config(kubeconfig(tmp_path / "config", address))


def test_unusable_credentials_name_their_file(tmp_path: Path, certificates: Path) -> None:
    (tmp_path / "garbage").write_text("no certificate")

    def message(user: dict[str, Any], cluster: dict[str, Any]) -> str:
        path = kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user, cluster)
        with pytest.raises(ClientError) as caught:
            ApiClient.from_config(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert str(tmp_path / "garbage") in message({}, {"certificate-authority": "garbage"})
    assert "nowhere.crt" in message({}, {"certificate-authority": "nowhere.crt"})
    assert message({}, {"certificate-authority-data": "%%%"}).startswith(str(tmp_path / "config"))
    certificate = str(certificates / "client.crt")
    encrypted = {"client-certificate": certificate, "client-key": str(certificates / "encrypted.key")}
    assert "encrypted.key" in message(encrypted, {})
    wrong = {"client-certificate": certificate, "client-key": str(certificates / "server.key")}
    assert "server.key" in message(wrong, {})
    assert "No such file" in message({"tokenFile": "nowhere"}, {})


def test_large_lists_come_compressed_and_watches_do_not(server: ApiServer, config: str) -> None:
    server.create(endpoint_slice("big", "web", [f"10.{i // 250}.0.{i % 250}" for i in range(5000)]))
    client = ApiClient.from_config(config)
    path = "/apis/discovery.k8s.io/v1/endpointslices"
    with client.get(path, {}, HANG) as response:
        assert response.headers["content-encoding"] == "gzip"
        assert len(json.loads(response.read())["items"][0]["endpoints"]) == 5000
    with client.get(path, {"watch": "1"}, HANG) as watch:
        line = next(split_lines(watch.chunks()))
        assert len(json.loads(line)["object"]["endpoints"]) == 5000
    encodings = [seen.headers["Accept-Encoding"] for seen in server.requests.all()]
    assert encodings == ["gzip", "identity"]


def test_post(server: ApiServer, config: str) -> None:
    client = ApiClient.from_config(config)
    body = json.dumps({"metadata": {"name": "e"}, "reason": "größe"}).encode()
    with client.post("/api/v1/namespaces/demo/events", body, HANG) as response:
        assert response.status == 201
    (seen,) = server.requests.all()
    assert (seen.method, seen.body, seen.headers["Content-Type"]) == ("POST", body, "application/json")


class scripted:  # noqa: N801 - used like a function
    """A server that answers its one connection with the given pieces, each sent by itself."""

    def __init__(self, pieces: list[bytes], *, end: bool = True) -> None:
        self._pieces, self._end = pieces, end
        self._done = threading.Event()
        self._sent: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> tuple[int, list[bytes]]:
        self._thread.start()
        return self._listener.getsockname()[1], self._sent

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(HANG)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sent.append(connection.recv(1 << 16))
            for piece in self._pieces:
                connection.sendall(piece)
            if not self._end:
                self._done.wait(HANG)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.0 200 OK\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def read_lines(pieces: list[bytes], *, end: bool = True, timeout: float = HANG) -> tuple[list[bytes], str]:
    """Return the lines that arrive, and the name of the exception that ends them."""
    found: list[bytes] = []
    with scripted(pieces, end=end) as (port, _):
        client = ApiClient.from_config(None, f"http://127.0.0.1:{port}")
        try:
            with client.get("/", {"watch": "1"}, timeout) as response:
                found.extend(split_lines(response.chunks()))
        except TransportError as error:
            return found, type(error).__name__
    return found, ""


TEXT = '{"name":"größe"}\n{"name":"名前"}\n\n{"name":"' + "x" * 3_000_000 + '"}\n{"cut":'
LINES = TEXT.encode().split(b"\n")[:-1]


@pytest.mark.parametrize("size", [7, 1000, 65536, 10_000_000])
def test_lines_wherever_the_chunks_end(size: int) -> None:
    data = TEXT.encode()
    if size == 7:
        data = data[:60] + data[-20:]
    pieces = [chunk(data[start : start + size]) for start in range(0, len(data), size)]
    expected = data.split(b"\n")[:-1]
    assert read_lines([CHUNKED, *pieces, chunk(b"")]) == (expected, "")


def test_lines_without_chunks() -> None:
    assert read_lines([PLAIN, TEXT.encode()]) == (LINES, "")


def test_a_line_is_there_as_soon_as_its_end_is() -> None:
    for head, wrap in ((CHUNKED, chunk), (PLAIN, bytes)):
        found, error = read_lines([head, wrap(b"one\ntwo\nthr")], end=False, timeout=0.3)
        assert (found, error) == ([b"one", b"two"], "SilenceError")


@pytest.mark.parametrize(
    "pieces",
    [
        [CHUNKED, chunk(b"one\n"), b"ff\r\nabc"],
        [CHUNKED, chunk(b"one\n")],
        [CHUNKED, chunk(b"one\n"), b"no number\r\n"],
    ],
)
def test_a_broken_stream_is_no_end(pieces: list[bytes]) -> None:
    assert read_lines(pieces) == ([b"one"], "TransportError")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", TransportError),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", TransportError),
        (b"no HTTP at all\r\n\r\n", TransportError),
        (b"", TransportError),
    ],
)
def test_broken_answers(answer: bytes, error: type[Exception]) -> None:
    with scripted([answer]) as (port, _), pytest.raises(error) as caught:
        get(ApiClient.from_config(None, f"http://127.0.0.1:{port}"))
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_silence_before_the_headers() -> None:
    with scripted([], end=False) as (port, _):
        client = ApiClient.from_config(None, f"http://127.0.0.1:{port}")
        with pytest.raises(SilenceError):
            client.get("/", {}, 0.2)


def test_nobody_listens_says_the_same_each_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = ApiClient.from_config(None, f"http://127.0.0.1:{port}")
    said = set()
    for _ in range(2):
        with pytest.raises(TransportError) as caught:
            get(client)
        said.add(str(caught.value))
    assert len(said) == 1
    assert "Connection refused" in said.pop()


def test_redirects_are_answers() -> None:
    with scripted([b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"]) as (port, _):
        assert get(ApiClient.from_config(None, f"http://127.0.0.1:{port}"))[0] == 302


def close_while_reading(client: ApiClient, params: dict[str, str], path: str = SERVICES) -> list[BaseException | None]:
    response: ApiResponse = client.get(path, params, HANG)
    ended: list[BaseException | None] = []
    lines = split_lines(response.chunks())
    next(lines)

    def read() -> None:
        try:
            ended.extend(None for _ in lines)
            ended.append(None)
        except TransportError as error:
            ended.append(error)
        finally:
            response.release()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    response.close()
    reader.join(HANG)
    assert not reader.is_alive()
    response.close()
    return ended


@pytest.mark.parametrize("secure", [False, True])
def test_close_from_another_thread_ends_a_read(certificates: Path, tmp_path: Path, secure: bool) -> None:
    tls = server_context(certificates) if secure else None
    with ApiServer(tls=tls) as server:
        server.create(service("web", "10.96.7.1"))
        cluster = {"insecure-skip-tls-verify": True}
        client = ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, {}, cluster))
        assert len(close_while_reading(client, {"watch": "1"})) == 1


def test_connections_are_probed_while_idle(server: ApiServer, config: str) -> None:
    client = ApiClient.from_config(config)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    with client.get(SERVICES, {"watch": "1"}, HANG) as response:
        sock = response._raw.connection.sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [30, 10, 3]


def loaded_by(program: str, *names: str) -> set[str]:
    """Return which of these packages and modules a program has loaded at its end."""
    told = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    modules = done.stdout.split()
    return {name for name in names if any(f"{module}.".startswith(f"{name}.") for module in modules)}


def test_the_client_knows_no_object_format() -> None:
    assert loaded_by("import kproxy.kube.client.client, kproxy.kube.client.plugin_access", "kproxy.kube.codec") == set()


def test_only_a_client_needs_http() -> None:
    assert loaded_by("import kproxy.app.daemon", "kubernetes", "urllib3") == set()


def asking(config: str) -> str:
    return (
        "from kproxy.kube.client.client import ApiClient\n"
        f"client = ApiClient.from_config({config!r}); assert client.get({SERVICES!r}, {{}}, 20).read()"
    )


def test_plain_credentials_are_read_without_the_package(server: ApiServer, config: str) -> None:
    assert loaded_by(asking(config), "kubernetes", "requests", "urllib3") == {"urllib3"}


def test_no_api_class_or_model_is_loaded(server: ApiServer, tmp_path: Path) -> None:
    text = """import json
print(json.dumps({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                  "status": {"token": "secret"}}))"""
    config = kubeconfig(tmp_path / "config", server.url, plugin(tmp_path / "plugin", text))
    heavy = ("kubernetes.client.models.v1_service", "kubernetes.client.api.core_v1_api")
    assert loaded_by(asking(config), "kubernetes", *heavy) == {"kubernetes"}


PACKAGE_ONLY: list[dict[str, Any]] = [{"username": "me", "password": "secret"}, {"as": "", "token": "secret"}]


@pytest.mark.parametrize("user", PACKAGE_ONLY)
def test_what_is_not_plain_is_left_to_the_package(server: ApiServer, tmp_path: Path, user: dict[str, Any]) -> None:
    path = kubeconfig(tmp_path / "config", server.url, user)
    assert find_static_config(path, None, {}) is None
    get(ApiClient.from_config(path))
    scheme = "Bearer" if "token" in user else "Basic"
    assert server.requests.all()[0].headers["Authorization"].startswith(scheme)


def test_a_server_behind_a_proxy_of_the_environment_is_left_to_the_package(tmp_path: Path) -> None:
    config = kubeconfig(tmp_path / "config", "https://10.0.5.1:6443", {"token": "secret"})
    proxy = {"https_proxy": "http://proxy.example:3128"}
    assert find_static_config(config, None, {}) is not None
    assert find_static_config(config, None, proxy) is None
    assert find_static_config(config, None, proxy | {"NO_PROXY": "10.0.0.0/8"}) is not None
    assert find_static_config(config, "https://127.0.0.1:6443", proxy) is not None
    assert find_static_config(None, "https://10.0.5.1:6443", proxy) is None


class NoEnvironment(dict[str, str]):
    """An environment that must not be read."""

    def __getitem__(self, name: str) -> str:
        raise AssertionError(f"{name} was read")

    def get(self, name: str, default: object = None) -> Any:
        raise AssertionError(f"{name} was read")

    def __contains__(self, name: object) -> bool:
        raise AssertionError(f"{name} was read")


def test_static_credentials_depend_on_the_given_environment_only(
    account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account / "token").write_text("of-the-pod")
    (account / "ca.crt").write_text("")
    (tmp_path / "key").write_text("of-the-home")
    kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {"tokenFile": "key"})
    given = {"HOME": str(tmp_path), "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    proxied = given | {"HTTPS_PROXY": "http://proxy.example:3128"}
    database = SimpleNamespace(getpwuid=lambda _: SimpleNamespace(pw_dir=str(tmp_path)))
    monkeypatch.setattr("kproxy.kube.client.cluster_access.pwd", database)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", NoEnvironment())
        of_home = find_static_config("~/config", None, given)
        without_home = find_static_config("~/config", None, {})
        of_pod = find_static_config(None, None, given)
        assert find_static_config("~/config", None, proxied) is None
        with pytest.raises(ClientError, match="KUBERNETES_SERVICE_PORT are not set"):
            find_static_config(None, None, {})
    assert of_home == without_home
    assert of_home and of_pod  # noqa: PT018 - for the type checker
    assert (of_home.server, of_home.token) == ("https://192.0.2.1:6443", "of-the-home")
    assert (of_pod.server, of_pod.token) == ("https://10.96.0.1:443", "of-the-pod")


def test_a_home_that_does_not_exist_is_one_error() -> None:
    with pytest.raises(ClientError, match=r"^~nobody-of-that-name/config: No such file or directory$"):
        ApiClient.from_config("~nobody-of-that-name/config")


@pytest.mark.parametrize("user", [{"token": "secret"}, {"tokenFile": "token"}, {}])
def test_both_ways_send_the_same(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: dict[str, Any]
) -> None:
    (tmp_path / "token").write_text("secret\n")
    path = kubeconfig(tmp_path / "config", f"{server.url}/", user)
    get(ApiClient.from_config(path))
    monkeypatch.setattr("kproxy.kube.client.client.find_static_config", lambda *_, **__: None)
    get(ApiClient.from_config(path))
    plain, package = (seen.headers for seen in server.requests.all())
    assert dict(plain) == dict(package)


def test_a_token_file_counts_more_than_a_token(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    user = {"tokenFile": "token", "token": "old"}
    assert get(ApiClient.from_config(kubeconfig(tmp_path / "config", server.url, user)))[0] == 200
