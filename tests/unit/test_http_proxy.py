"""Choice of the HTTP proxy for the API server, by the rules of Go, which kube-proxy and kubectl apply too."""

from __future__ import annotations

import pytest

from kproxy.kube.client.http_proxy import http_proxy_for

PROXY = "http://192.0.2.10:3128"
OTHER = "http://192.0.2.11:3128"


@pytest.mark.parametrize(
    ("server", "environment", "expected"),
    [
        ("https://10.0.5.1:6443", {}, ""),
        ("https://10.0.5.1:6443", {"HTTPS_PROXY": ""}, ""),
        ("https://10.0.5.1:6443", {"HTTPS_PROXY": PROXY, "HTTP_PROXY": OTHER}, PROXY),
        ("http://10.0.5.1:6443", {"HTTPS_PROXY": PROXY, "HTTP_PROXY": OTHER}, OTHER),
        ("https://10.0.5.1:6443", {"HTTP_PROXY": PROXY}, ""),
        ("http://10.0.5.1:6443", {"HTTPS_PROXY": PROXY}, ""),
        ("https://10.0.5.1:6443", {"ALL_PROXY": PROXY, "all_proxy": PROXY}, ""),
        ("https://10.0.5.1:6443", {"https_proxy": PROXY}, PROXY),
        ("https://10.0.5.1:6443", {"https_proxy": OTHER, "HTTPS_PROXY": PROXY}, PROXY),
        ("https://10.0.5.1:6443", {"https_proxy": PROXY, "HTTPS_PROXY": ""}, PROXY),
        ("https://10.0.5.1:6443", {"HTTPS_PROXY": "192.0.2.10:3128"}, PROXY),
        ("https://10.0.5.1:6443", {"HTTPS_PROXY": f" {PROXY} "}, PROXY),
        ("https://10.0.5.1:6443", {"HTTPS_PROXY": "socks5://192.0.2.10:1080"}, "socks5://192.0.2.10:1080"),
        ("https://10.0.5.1:6443", {"HTTPS_PROXY": PROXY, "REQUEST_METHOD": "GET"}, PROXY),
        ("http://10.0.5.1:6443", {"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}, ""),
        ("HTTPS://10.0.5.1:6443", {"HTTPS_PROXY": PROXY}, PROXY),
        ("https://[::1", {"HTTPS_PROXY": PROXY}, ""),
        ("10.0.5.1:6443", {"HTTPS_PROXY": PROXY, "HTTP_PROXY": PROXY}, ""),
    ],
)
def test_proxy_from_the_environment(server: str, environment: dict[str, str], expected: str) -> None:
    assert http_proxy_for(server, environment) == expected


@pytest.mark.parametrize("host", ["localhost", "LocalHost", "127.0.0.1", "127.8.9.10", "[::1]", "[::ffff:127.0.0.1]"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_loopback_servers_never_use_a_proxy(scheme: str, host: str) -> None:
    environment = {"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "NO_PROXY": "other.example"}
    assert http_proxy_for(f"{scheme}://{host}:6443", environment) == ""
    assert http_proxy_for(f"{scheme}://{host}", environment) == ""


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("10.0.5.1", "", False),
        ("10.0.5.1", "*", True),
        ("10.0.5.1", "other.example, *", True),
        ("10.0.5.1", "127.0.0.0/8,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16", True),
        ("10.0.5.1", ".svc,.cluster.local,10.0.0.0/8", True),
        ("10.0.5.1", " 10.0.0.0/8 , .svc", True),
        ("10.0.5.1", "10.9.9.9/8", True),
        ("10.0.5.1", "10.0.6.0/24", False),
        ("10.0.5.1", "10.0.5.1/33,/,//", False),
        ("10.0.5.1", "10.0.5.1", True),
        ("10.0.5.1", "10.0.5.1:6443", True),
        ("10.0.5.1", "10.0.5.1:443", False),
        ("10.0.5.1", "10.0.5.10,10.0.5", False),
        ("10.0.5.1", "0.5.2,.0.5.2", False),
        ("10.0.5.1", "fd00::/8,::/0", False),
        ("[fd00:5::1]", "fd00:5::1", True),
        ("[fd00:5::1]", "FD00:5:0::1", True),
        ("[fd00:5::1]", "[fd00:5::1]", True),
        ("[fd00:5::1]", "[fd00:5::1]:6443", True),
        ("[fd00:5::1]", "[fd00:5::1]:443", False),
        ("[fd00:5::1]", "fd00::/8,10.0.0.0/8", True),
        ("[fd00:5::1]", "fd00:6::/32,0.0.0.0/0", False),
        ("[::ffff:10.0.5.1]", "10.0.0.0/8", True),
        ("[::ffff:10.0.5.1]", "10.0.5.1", True),
        ("api.internal.example", ".internal.example", True),
        ("api.internal.example", "internal.example", True),
        ("api.internal.example", "*.internal.example", True),
        ("api.internal.example", ".EXAMPLE", True),
        ("API.Internal.Example", "internal.example", True),
        ("api.internal.example", "api.internal.example", True),
        ("api.internal.example", "api.internal.example:6443", True),
        ("api.internal.example", ".example:6443", True),
        ("api.internal.example", "example:443", False),
        ("internal.example", ".internal.example", False),
        ("internal.example", "*.internal.example", False),
        ("internal.example", "internal.example", True),
        ("api.internal.example", "ternal.example", False),
        ("api.internal.example", "*ternal.example", False),
        ("api.internal.example", "10.0.0.0/8", False),
        ("api.internal.example", ",, ,", False),
        ("api.internal.example", ":6443", False),
        ("myhost.localhost", "", False),
    ],
)
def test_no_proxy(host: str, no_proxy: str, direct: bool) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        environment = {"HTTPS_PROXY": PROXY, name: no_proxy}
        assert http_proxy_for(f"https://{host}:6443", environment) == ("" if direct else PROXY)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_no_proxy_ports_match_the_default_port_of_the_scheme(scheme: str, port: int) -> None:
    environment = {"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY}
    assert http_proxy_for(f"{scheme}://kube.example", environment | {"NO_PROXY": f"kube.example:{port}"}) == ""
    assert http_proxy_for(f"{scheme}://kube.example", environment | {"NO_PROXY": f"kube.example:{port + 1}"}) == PROXY
