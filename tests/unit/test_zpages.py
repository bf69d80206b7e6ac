"""`/statusz` and `/flagz`: text by default, the documented JSON on request, and 406 for any other media type."""

from __future__ import annotations

import argparse
import json

import pytest

from kproxy.config import Config, configure
from kproxy.config.flag_table import CONFIG_FLAGS, PORT_FLAGS
from kproxy.config.flags import add_flags, flag_values
from kproxy.serve.http import Handler, HttpRequest
from kproxy.serve.zpages import flagz, statusz
from tests.clock import Clock

FLAGS = {"v": "2", "cleanup": "false", "nodeport-addresses": "[primary]"}


def pages(clock: Clock | None = None) -> dict[str, Handler]:
    up = clock or Clock(16.9)
    return {
        "Statusz": statusz(
            started=1729112623.4,
            up=up,
            binary_version="0.1.0",
            python_version="3.11.7 (CPython)",
            paths=("/statusz", "/metrics"),
        ),
        "Flagz": flagz(lambda: FLAGS),
    }


def request(handler: Handler, accept: str | None) -> tuple[int, str, str]:
    """Request a page; return status, content type and body."""
    headers = {} if accept is None else {"accept": accept}
    answer = handler(HttpRequest("GET", "/", headers, persistent=True))
    return answer.status, dict(answer.headers)["Content-Type"], answer.body.decode()


def test_statusz_as_text() -> None:
    clock = Clock(16.9)
    handler = pages(clock)["Statusz"]
    status, kind, body = request(handler, None)
    assert (status, kind) == (200, "text/plain; charset=utf-8")
    empty, title, warning, blank, *lines = body.split("\n")
    assert (empty, title, blank) == ("", "kproxy statusz", "")
    assert warning.startswith("Warning: ")
    assert lines == [
        "Started: Wed Oct 16 21:03:43 UTC 2024",
        "Up: 0 hr 00 min 16 sec",
        "Python version: 3.11.7 (CPython)",
        "Binary version: 0.1.0",
        "Emulation version: 1.38",
        "Paths: /metrics /statusz",
        "",
    ]
    clock.now = 100 * 3600 + 61
    assert "Up: 100 hr 01 min 01 sec\n" in request(handler, None)[2]


def test_flagz_as_text() -> None:
    _, _, body = request(pages()["Flagz"], None)
    empty, title, warning, blank, *lines = body.split("\n")
    assert (empty, title, blank) == ("", "kproxy flags", "")
    assert warning.startswith("Warning: ")
    assert lines == ["cleanup=false", "nodeport-addresses=[primary]", "v=2", ""]


@pytest.mark.parametrize("version", ["v1beta1", "v1alpha1"])
def test_statusz_and_flagz_as_json(version: str) -> None:
    documents = {}
    for kind, handler in pages().items():
        status, media_type, body = request(handler, f"application/json;v={version};g=config.k8s.io;as={kind}")
        assert (status, media_type) == (200, "application/json")
        documents[kind] = json.loads(body)
    head = {"apiVersion": f"config.k8s.io/{version}", "metadata": {"name": "kproxy"}}
    assert documents == {
        "Statusz": {
            "kind": "Statusz",
            **head,
            "startTime": "2024-10-16T21:03:43Z",
            "uptimeSeconds": 16,
            "binaryVersion": "0.1.0",
            "emulationVersion": "1.38",
            "paths": ["/metrics", "/statusz"],
        },
        "Flagz": {"kind": "Flagz", **head, "flags": FLAGS},
    }


JSON = "application/json;v=v1beta1;g=config.k8s.io;as="


@pytest.mark.parametrize("kind", ["Statusz", "Flagz"])
@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("text/*", "text/plain"),
        ("text/plain", "text/plain"),
        ("text/plain; charset=UTF-8", "text/plain"),
        ("text/html, */*;q=0.1", "text/plain"),
        ("application/json, text/plain", "text/plain"),
        (JSON + "{kind}, text/plain", "application/json"),
        ("text/plain;q=0.5, " + JSON + "{kind}", "application/json"),
        ("text/plain, " + JSON + "{kind};q=0.9", "text/plain"),
        ("Application/JSON; as={kind}; g=config.k8s.io; v=v1beta1", "application/json"),
        ("application/json", None),
        ("application/json;v=v1beta1", None),
        ("application/json;v=v1beta1;g=config.k8s.io", None),
        ("application/json;v=v1;g=config.k8s.io;as={kind}", None),
        ("application/json;v=v1beta1;g=apps;as={kind}", None),
        (JSON + "Pod", None),
        ("text/html", None),
        ("text/plain;charset=latin-1", None),
        ("text/plain;q=0", None),
        ("some header", None),
    ],
)
def test_content_negotiation(kind: str, accept: str, expected: str | None) -> None:
    status, media_type, body = request(pages()[kind], accept.format(kind=kind))
    if expected is None:
        assert status == 406
        assert f"{JSON}{kind}" in body
    else:
        assert (status, media_type.partition(";")[0]) == (200, expected)


def flagz_values(*arguments: str) -> dict[str, str]:
    """Return what `/flagz` shows for a command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    namespace = parser.parse_args(arguments)
    config, _ = configure(namespace)
    return flag_values(config, namespace)


def test_every_flag_has_a_value() -> None:
    values = flagz_values()
    names = {flag.name for flag in (*CONFIG_FLAGS, *PORT_FLAGS)}
    assert values.keys() == names | {"config", "master", "objects", "write-config-to", "cleanup", "init-only"}
    assert list(values) == sorted(values)
    expected = {
        "cleanup": "false",
        "config": "",
        "conntrack-tcp-timeout-established": "24h0m0s",
        "feature-gates": "",
        "healthz-port": "10256",
        "ipvs-exclude-cidrs": "[]",
        "iptables-localhost-nodeports": "true",
        "kube-api-qps": "5",
        "machine-id-file": "",
        "nodeport-addresses": "[]",
        "oom-score-adj": "-999",
        "proxy-mode": Config().mode,
        "v": "0",
        "vmodule": "",
    }
    assert {name: values[name] for name in expected} == expected


def test_explicit_flags_have_their_values() -> None:
    values = flagz_values(
        *("--proxy-mode=nftables", "--hostname-override=Node-1", "--nodeport-addresses=10.0.0.0/8,fd00::/8", "-v=4"),
        *("--iptables-sync-period=90s", "--feature-gates=B=true,A=false", "--vmodule=x=1", "--masquerade-all"),
        *("--healthz-port=10000", "--master=https://10.0.0.1:6443", "--machine-id-file=/etc/machine-id"),
    )
    expected = {
        "proxy-mode": "nftables",
        "hostname-override": "node-1",
        "nodeport-addresses": "[10.0.0.0/8,fd00::/8]",
        "v": "4",
        "iptables-sync-period": "1m30s",
        "feature-gates": "A=false,B=true",
        "vmodule": "x=1",
        "masquerade-all": "true",
        "healthz-port": "10000",
        "master": "https://10.0.0.1:6443",
        "machine-id-file": "/etc/machine-id",
        "cluster-cidr": "",
    }
    assert {name: values[name] for name in expected} == expected
