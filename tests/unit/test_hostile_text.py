"""Hostile text in objects, API errors and files never reaches the log, an event or the rules unescaped."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kproxy.app.one_shot import render
from kproxy.cli.log_format import JsonFormatter, TextFormatter
from kproxy.config import Config
from kproxy.kube.codec.conversion import DecodedObject, ignored_fields_text
from kproxy.kube.codec.json_codec import read_error, read_line
from kproxy.kube.codec.protobuf import FrameReader
from kproxy.kube.codec.watch_events import UndecodableObject
from kproxy.kube.events.correlator import EventOccurrence, EventReport, event_object, object_reference
from kproxy.kube.manifests.file_source import FileSourceError
from kproxy.model.delta import Kind
from kproxy.model.printable_text import MAX_LENGTH, printable
from kproxy.model.types import EndpointSlice, Family, Service
from tests.apiserver import protobuf

SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "namespace": "demo", "labels": {"app": "web"}},
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "clusterIPs": ["10.96.0.1"],
        "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}],
        "externalIPs": ["192.0.2.1"],
        "loadBalancerSourceRanges": ["198.51.100.0/24"],
        "sessionAffinity": "ClientIP",
        "externalTrafficPolicy": "Cluster",
        "internalTrafficPolicy": "Cluster",
    },
    "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "VIP"}]}},
}
SLICE: dict[str, Any] = {
    "apiVersion": "discovery.k8s.io/v1",
    "kind": "EndpointSlice",
    "metadata": {"name": "web-1", "namespace": "demo", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "endpoints": [
        {"addresses": ["10.244.0.1"], "nodeName": "node-1", "hints": {"forZones": [{"name": "a"}]}, "zone": "a"}
    ],
    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
}
KINDS: dict[str, Kind] = {"Service": Service, "EndpointSlice": EndpointSlice}
HOSTILE = (
    "a\nE0101 forged",
    "\r\n",
    "\x1b[2J\x1b[31m",
    "\u2028",
    "\u202etxt.exe",
    "\x00",
    "\x85\x9b",
    '"; -A KUBE-SERVICES -j ACCEPT',
    "x --jump ACCEPT\nCOMMIT",
    "n" * 10_000,
    "$(reboot)",
    "%s%n",
    "10.0.0.1\n",
    "{{}}",
    "ä" * 300,
)
TEXT = st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf-8"), max_size=300)


def string_paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every string in an object, except those that select how it is decoded."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, str) and path[-1] not in {"kind", "apiVersion"}:
        yield path
    for key, child in items:
        yield from string_paths(child, (*path, key))


PATHS = [(base, path) for base in (SERVICE, SLICE) for path in string_paths(base)]


def changed(base: dict[str, Any], path: tuple[str | int, ...], text: str) -> dict[str, Any]:
    """Return an object with another string at a path."""
    result = copy.deepcopy(base)
    parent: Any = result
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = text
    return result


def assert_harmless(text: str) -> None:
    """Assert that a text can be logged, recorded as an event and shown as it is."""
    assert text.isprintable()
    assert len(text) <= 1000
    record = logging.LogRecord("kproxy", logging.WARNING, "a.py", 1, "%s", (text,), None)
    for formatter in (TextFormatter(), JsonFormatter()):
        assert formatter.format(record).isprintable()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), TEXT)
def test_objects_of_the_api_server_are_described_in_printable_text(
    case: tuple[dict[str, Any], tuple[str | int, ...]], text: str
) -> None:
    hostile = changed(*case, text)
    kind = KINDS[hostile["kind"]]
    line = json.dumps({"type": "ADDED", "object": hostile}).encode()
    for event in (read_line(kind, line), FrameReader(kind).read(protobuf.frame("ADDED", hostile))):
        if isinstance(event, UndecodableObject):
            assert_harmless(event.text)
            reference = object_reference(kind, event.namespace, event.name, "node-1")
            occurrence = EventOccurrence(reference, "Warning", "InvalidObject", "Decode", event.text, 0.0, 1)
            body = event_object(EventReport(occurrence, 1, 1), "node-1")
            assert body["note"].isprintable()
            assert body["metadata"]["name"].isprintable()
            assert len(body["note"].encode()) <= 1024
        else:
            assert isinstance(event, DecodedObject)
            assert f"{event.namespace}/{event.name}".isprintable()
            assert_harmless(ignored_fields_text(event.ignored_fields))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATHS), TEXT, st.sampled_from(["iptables", "nftables"]), st.sampled_from(["yaml", "json"]))
def test_objects_in_files_are_refused_in_printable_lines_or_render_printable_rules(
    case: tuple[dict[str, Any], tuple[str | int, ...]], text: str, mode: str, suffix: str
) -> None:
    base, path = case
    items = [changed(each, path, text) if each is base else each for each in (SERVICE, SLICE)]
    document = {"apiVersion": "v1", "kind": "List", "items": items}
    content = yaml.safe_dump(document) if suffix == "yaml" else json.dumps(document)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"objects.{suffix}"
        file.write_text(content)
        config = Config(mode=mode, hostname_override="node-1")  # type: ignore[arg-type]  # a valid literal
        try:
            rules = render(config, str(file))
        except FileSourceError as error:
            for line in str(error).split("\n"):
                assert_harmless(line)
            return
    allowed = "\n\t"
    assert all(character in allowed or " " <= character <= "~" for character in rules[Family.IPV4])
    assert "ACCEPT\nCOMMIT" not in rules[Family.IPV4]


@pytest.mark.parametrize("text", HOSTILE)
def test_errors_of_the_api_server_are_printable(text: str) -> None:
    status = {"kind": "Status", "apiVersion": "v1", "message": text, "reason": text, "code": 500}
    assert_harmless(str(read_error(500, {}, json.dumps(status).encode())))
    assert_harmless(str(read_error(502, {}, f"<html>{text}".encode())))
    assert_harmless(str(read_error(502, {}, text.encode("utf-16"))))


@pytest.mark.parametrize("text", HOSTILE)
def test_notes_and_lines_are_escaped_whatever_their_origin(text: str) -> None:
    """Names of processes and foreign chains, file names, and output of programs reach logs and events this way."""
    occurrence = EventOccurrence(object_reference(Service, "demo", "web", "n"), "Warning", "R", "A", text, 0.0, 1)
    note = event_object(EventReport(occurrence, 1, 1), "node-1")["note"]
    assert note.isprintable()
    assert len(note.encode()) <= 1024
    assert printable(text, 100).isprintable()
    assert len(printable(text, MAX_LENGTH)) <= MAX_LENGTH + 40


@given(st.text())
def test_escaping_is_idempotent_and_keeps_printable_text(text: str) -> None:
    once = printable(text)
    assert once.isprintable()
    assert printable(once) == once
    if text.isprintable():
        assert once == text
