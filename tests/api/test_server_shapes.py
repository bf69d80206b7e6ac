"""The answers of the test server have the same shape as recorded answers of kube-apiserver."""

from __future__ import annotations

import gzip
import json
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from tests.apiserver import ApiServer
from tests.apiserver.objects import endpoint_slice, service

RECORDED = Path(__file__).parent.parent / "watch"
VALUES = {"resourceVersion", "continue", "name", "namespace", "message"}
"""Fields whose values differ between servers."""


def body_of(name: str) -> Any:
    return json.loads((RECORDED / name).read_text().partition("\n\n")[2])


def get(server: ApiServer, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any, bytes]:
    request = urllib.request.Request(server.url + path, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except HTTPError as error:
        return error.code, error.headers, error.read()


def shape(value: Any) -> Any:
    """Replace values that may differ by their types."""
    if isinstance(value, dict):
        return {
            key: type(inner).__name__ if key in VALUES and not isinstance(inner, dict) else shape(inner)
            for key, inner in value.items()
        }
    return value


@pytest.fixture
def filled() -> Any:
    with ApiServer(bookmark_interval=0.1) as server:
        server.create(service("web", "10.96.7.1"))
        server.create(service("db", "10.96.7.2"))
        server.create(service("tls", "10.96.7.3"))
        server.create(endpoint_slice("web-1", "web", ["10.0.0.1"]))
        yield server


def test_page_of_a_list(filled: ApiServer) -> None:
    status, headers, text = get(filled, "/api/v1/services?limit=2")
    page, recorded = json.loads(text), body_of("list-page-1.txt")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert list(page) == list(recorded)
    assert shape(page["metadata"]) == shape(recorded["metadata"]) | {"remainingItemCount": 1}
    assert {"kind", "apiVersion"}.isdisjoint(page["items"][0]) == {"kind", "apiVersion"}.isdisjoint(
        recorded["items"][0]
    )
    token = page["metadata"]["continue"]
    last = json.loads(get(filled, f"/api/v1/services?limit=2&continue={token}")[2])
    assert shape(last["metadata"]) == shape(body_of("list-page-2.txt")["metadata"])
    names = [item["metadata"]["name"] for item in page["items"] + last["items"]]
    assert names == ["db", "tls", "web"]


def test_continued_list_is_a_consistent_snapshot(filled: ApiServer) -> None:
    token = json.loads(get(filled, "/api/v1/services?limit=2")[2])["metadata"]["continue"]
    filled.delete(service("web", ""))
    items = json.loads(get(filled, f"/api/v1/services?limit=2&continue={token}")[2])["items"]
    assert [item["metadata"]["name"] for item in items] == ["web"]


def test_rejected_continuations(filled: ApiServer) -> None:
    token = json.loads(get(filled, "/api/v1/services?limit=1")[2])["metadata"]["continue"]
    filled.compact()
    status, _, text = get(filled, f"/api/v1/services?limit=1&continue={token}")
    recorded = body_of("list-continue-too-old.txt")
    assert (status, shape(json.loads(text))) == (410, shape(recorded))
    assert json.loads(text)["message"] == recorded["message"]
    status, _, text = get(filled, "/api/v1/services?limit=1&continue=bad!")
    assert (status, shape(json.loads(text))) == (400, shape(body_of("list-bad-continue.txt")))


def test_forbidden(filled: ApiServer) -> None:
    filled.fail_requests(403)
    status, _, text = get(filled, "/api/v1/services")
    assert (status, json.loads(text)) == (403, body_of("unauthorized.txt"))


def test_watch_from_a_compacted_version(filled: ApiServer) -> None:
    filled.compact()
    status, _, text = get(filled, "/api/v1/services?watch=1&resourceVersion=1")
    recorded = json.loads((RECORDED / "watch-too-old.txt").read_text().splitlines()[-1])
    assert (status, shape(json.loads(text))) == (200, shape(recorded))


def test_watch_list_with_an_old_etcd(filled: ApiServer) -> None:
    filled.set_watch_list("old-etcd")
    query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan"
    recorded = json.loads((RECORDED / "watchlist-unsupported-by-old-etcd.jsonl").read_text())
    assert json.loads(get(filled, f"/api/v1/services?{query}")[2]) == recorded


@pytest.mark.parametrize(
    ("path", "recording"),
    [
        ("/api/v1/services", "services.watchlist.jsonl"),
        ("/apis/discovery.k8s.io/v1/endpointslices", "endpointslices.watchlist.jsonl"),
    ],
)
def test_watch_list(filled: ApiServer, path: str, recording: str) -> None:
    query = "watch=1&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&timeoutSeconds=1"
    events = [json.loads(line) for line in get(filled, f"{path}?{query}")[2].splitlines()]
    recorded = [json.loads(line) for line in (RECORDED / recording).read_text().splitlines()]

    def bookmarks(lines: list[Any]) -> list[Any]:
        return [shape(line) for line in lines if line["type"] == "BOOKMARK"]

    assert bookmarks(events)[:2] == bookmarks(recorded)[:2]
    assert list(events[0]) == list(recorded[0])
    assert list(events[0]["object"])[:3] == list(recorded[0]["object"])[:3]
    assert events[0]["object"]["kind"] == recorded[0]["object"]["kind"]


def test_large_lists_are_compressed_on_request(filled: ApiServer) -> None:
    filled.create(endpoint_slice("big", "web", [f"10.{i // 250}.0.{i % 250}" for i in range(5000)]))
    path = "/apis/discovery.k8s.io/v1/endpointslices"
    _, plain_headers, plain = get(filled, path)
    _, headers, compressed = get(filled, path, {"Accept-Encoding": "gzip"})
    assert (plain_headers["Content-Encoding"], headers["Content-Encoding"]) == (None, "gzip")
    assert gzip.decompress(compressed) == plain
    assert len(compressed) < len(plain) // 4


def test_selectors(filled: ApiServer) -> None:
    other = service("other", "10.96.7.4")
    other["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "x"}
    filled.create(other)
    filled.create(service("headless", "None"))

    def names(query: str) -> list[str]:
        items = json.loads(get(filled, f"/api/v1/services?{query}")[2])["items"]
        return [item["metadata"]["name"] for item in items]

    all_names = ["db", "headless", "other", "tls", "web"]
    assert names("") == all_names
    assert names("labelSelector=%21service.kubernetes.io/service-proxy-name") == ["db", "headless", "tls", "web"]
    assert names("labelSelector=service.kubernetes.io/service-proxy-name%20in%20(x,y)") == ["other"]
    assert names("fieldSelector=spec.clusterIP%21%3DNone,spec.type%21%3DExternalName") == sorted(
        set(all_names) - {"headless"}
    )
    assert names("fieldSelector=metadata.name%3Dweb") == ["web"]
    status, _, text = get(filled, "/api/v1/services?fieldSelector=spec.nothing%3D1")
    assert (status, json.loads(text)["reason"]) == (400, "BadRequest")


def test_events_can_be_posted(filled: ApiServer) -> None:
    body = json.dumps({"metadata": {"generateName": "web."}, "reason": "Test"}).encode()
    url = f"{filled.url}/api/v1/namespaces/demo/events"
    with urllib.request.urlopen(urllib.request.Request(url, body, method="POST"), timeout=20) as answer:
        created = json.load(answer)
    assert created["metadata"]["namespace"] == "demo"
    assert json.loads(get(filled, "/api/v1/events")[2])["items"][0]["reason"] == "Test"
