"""Kubernetes objects in files: parsing, snapshots of a path, and watching it for changes."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kproxy.documents import watch as document_watch
from kproxy.documents.document import FileProblem
from kproxy.documents.watch import PathSnapshot, SettledReader, find_watched_paths, read_path
from kproxy.host.inotify import Inotify, InotifyError
from kproxy.kube.manifests import file_source
from kproxy.kube.manifests.file_source import FileSource, FileSourceError, ManifestState
from kproxy.kube.manifests.parse import load_objects, parse_file
from kproxy.model.delta import Delta, Kind, Replace
from kproxy.model.store import Store
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR, ServicePort
from tests.lab.waiting import HANG_GUARD

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS: list[Kind] = [Service, EndpointSlice, Node, ServiceCIDR]


def service(name: str, namespace: str | None = "demo", **spec: Any) -> dict[str, Any]:
    metadata = {"name": name} if namespace is None else {"name": name, "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}], **spec},
    }


def service_cidr(name: str, *cidrs: str) -> dict[str, Any]:
    spec = {"cidrs": list(cidrs)}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name}, "spec": spec}


def manifest(*objects: dict[str, Any]) -> bytes:
    return yaml.safe_dump_all(objects).encode()


def problems(path: str, content: str) -> list[str]:
    file = parse_file(path, content.encode())
    return [str(problem) for problem in (*file.problems, *(problem for _, problem in file.invalid))]


def object_names(replacements: tuple[Replace, ...]) -> list[list[str]]:
    return [[item.name for item in replacement.objects] for replacement in replacements]


# Content of files


@pytest.mark.parametrize("directory", sorted(GOLDEN.glob("*/")), ids=lambda directory: directory.name)
def test_recorded_clusters_load_identically_from_json_and_yaml(directory: Path) -> None:
    texts = {str(path): path.read_bytes() for path in directory.glob("*.json")}
    loaded = load_objects(texts)
    assert not loaded.problems
    assert not loaded.warnings
    assert loaded.notes == (
        f"{directory}/config.json: ignoring kubeproxy.config.k8s.io/v1alpha1 KubeProxyConfiguration: "
        "kproxy does not use this kind",
    )
    assert [replacement.kind for replacement in loaded.replacements] == KINDS
    assert [bool(replacement.objects) for replacement in loaded.replacements] == [True, True, True, False]
    as_yaml = {
        path.replace(".json", ".yaml"): yaml.safe_dump(json.loads(content)).encode() for path, content in texts.items()
    }
    assert load_objects(as_yaml).replacements == loaded.replacements


def test_lists_single_objects_and_multiple_documents() -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
    }
    loaded = load_objects(
        {
            "a.yaml": manifest({"apiVersion": "v1", "kind": "List", "items": [service("a"), node]}, endpoints),
            "b.json": json.dumps(service("b")).encode(),
            "c.json": json.dumps(
                {"apiVersion": "v1", "kind": "ServiceList", "items": [{"metadata": {"name": "headless"}}]}
            ).encode(),
            "d.yml": b"apiVersion: v1\nkind: NodeList\nitems:\n",
            "e.yaml": manifest(service_cidr("kubernetes", "10.96.0.0/16", "fd00::/108")),
            "f.yaml": manifest({**service_cidr("more", "10.97.0.0/16"), "apiVersion": "networking.k8s.io/v1beta1"}),
        }
    )
    assert not loaded.problems
    assert object_names(loaded.replacements) == [["a", "b"], ["web-1"], ["node-1"], ["kubernetes", "more"]]


def test_namespace_of_a_service_cidr_is_ignored() -> None:
    namespaced = service_cidr("kubernetes", "10.97.0.0/16")
    namespaced["metadata"]["namespace"] = "demo"
    loaded = load_objects(
        {"a.yaml": manifest(service_cidr("kubernetes", "10.96.0.0/16")), "b.yaml": manifest(namespaced)}
    )
    assert loaded.warnings == (
        "ServiceCIDR kubernetes is defined in a.yaml and in b.yaml; using the definition in b.yaml",
    )
    assert loaded.replacements[-1] == Replace(ServiceCIDR, (ServiceCIDR("kubernetes", ("10.97.0.0/16",)),))


def test_missing_namespace_means_default() -> None:
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
    }
    loaded = load_objects({"a.yaml": manifest(service("web", None)), "b.json": json.dumps(endpoints).encode()})
    (web,), (web_1,), *_ = (replacement.objects for replacement in loaded.replacements)
    assert isinstance(web, Service)
    assert web.key == "default/web"
    assert isinstance(web_1, EndpointSlice)
    assert (web_1.namespace, web_1.service) == ("default", "default/web")


def test_unused_kinds_are_noted_once_per_file() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}
    old = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "e"}}
    other = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "k"}}
    pods = {"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": {"name": "p"}}]}
    loaded = load_objects({"a.yaml": manifest(pod, pod, old, other, pods, service("a"))})
    assert not loaded.problems
    assert loaded.notes == (
        "a.yaml: ignoring v1 Pod: kproxy does not use this kind",
        "a.yaml: ignoring v1 Endpoints: kproxy does not use this kind",
        "a.yaml: ignoring serving.knative.dev/v1 Service: kproxy does not use this kind",
        "a.yaml: ignoring v1 PodList: kproxy does not use this kind",
    )
    assert object_names(loaded.replacements) == [["a"], [], [], []]


def test_last_file_wins_if_two_files_define_an_object() -> None:
    loaded = load_objects(
        {
            "b.yaml": manifest(service("web", clusterIP="10.96.0.2")),
            "a.yaml": manifest(service("web", clusterIP="10.96.0.1"), service("other")),
        }
    )
    assert loaded.warnings == ("Service demo/web is defined in a.yaml and in b.yaml; using the definition in b.yaml",)
    objects = {item.name: item for item in loaded.replacements[0].objects}
    assert objects.keys() == {"web", "other"}
    assert isinstance(objects["web"], Service)
    assert objects["web"].cluster_ips == ("10.96.0.2",)


def test_last_definition_in_a_file_wins() -> None:
    twice = manifest(service("web", clusterIP="10.96.0.1"), service("web", clusterIP="10.96.0.2"))
    loaded = load_objects({"a.yaml": twice})
    assert loaded.warnings == ("Service demo/web is defined more than once in a.yaml; using the last definition",)
    (web,) = loaded.replacements[0].objects
    assert isinstance(web, Service)
    assert web.cluster_ips == ("10.96.0.2",)


def test_headless_service_in_a_later_file_replaces_the_service() -> None:
    loaded = load_objects({"a.yaml": manifest(service("web")), "b.yaml": manifest(service("web", clusterIP="None"))})
    assert loaded.replacements[0].objects == ()
    assert len(loaded.warnings) == 1


# Problems in files

HEAD = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: demo\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEAD + "spec:\n  clusterIP: 10.0.0.1\n  ports:\n  - port: '80'\n",
            'f.yaml:9: Service demo/web: spec.ports[0].port must be an integer, not "80"',
        ),
        (
            HEAD + "spec:\n  clusterIP: 10.0.0.1\n  ports:\n  - port: 80\n  - port: 70000\n",
            "f.yaml:10: Service demo/web: spec.ports[1].port must be from 1 to 65535, not 70000",
        ),
        (
            HEAD + "spec:\n  clusterIP: 10.0.0.1\n  ports: [{port: 0080}]\n",
            'f.yaml:8: Service demo/web: spec.ports[0].port must be an integer, not "0080"',
        ),
        (
            HEAD + "spec:\n  clusterIP: 10.0.0.1\n  ports: [{port: 80, protocol: tcp}]\n",
            'f.yaml:8: Service demo/web: spec.ports[0].protocol must be one of TCP, UDP, SCTP, not "tcp"',
        ),
        (
            HEAD + "  labels:\n    good: a\n    bad: 1\n",
            "f.yaml:8: Service demo/web: metadata.labels.bad must be a string, not 1",
        ),
        (
            HEAD + "  labels: {1: a}\n",
            "f.yaml:6: Service demo/web: metadata.labels must have only strings as keys, not 1",
        ),
        (
            HEAD + "spec:\n  clusterIP: 10.0.0.1\n  externalIPs: [10.0.0.2, here]\n",
            'f.yaml:8: Service demo/web: spec.externalIPs[1] must be an IP address, not "here"',
        ),
        (
            "kind: Service\napiVersion: v1\nmetadata: {name: on}\n",
            "f.yaml:3: Service: metadata.name must be a string, not true",
        ),
        (
            "kind: Service\napiVersion: v1\n",
            "f.yaml:1: Service: metadata is missing",
        ),
        (
            "kind: Node\napiVersion: v1\nmetadata: {}\n",
            "f.yaml:3: Node: metadata.name is missing",
        ),
        (
            "kind: Node\napiVersion: v1\nmetadata: {name: n}\nspec: {podCIDRs: [x]}\n",
            'f.yaml:4: Node n: spec.podCIDRs[0] must be a CIDR (such as 10.0.0.0/8), not "x"',
        ),
        (
            "kind: ServiceCIDR\napiVersion: networking.k8s.io/v1\nmetadata: {name: a}\nspec:\n"
            "  cidrs: [10.96.0.0/16, fd00::/129]\n",
            'f.yaml:5: ServiceCIDR a: spec.cidrs[1] must be a CIDR (such as 10.0.0.0/8), not "fd00::/129"',
        ),
        (
            "kind: ServiceCIDR\napiVersion: networking.k8s.io/v1alpha1\nmetadata: {name: a}\n",
            "f.yaml:2: ServiceCIDR a: apiVersion must be networking.k8s.io/v1 or networking.k8s.io/v1beta1, "
            'not "networking.k8s.io/v1alpha1"',
        ),
        (
            "kind: EndpointSlice\napiVersion: discovery.k8s.io/v1beta1\nmetadata: {name: e}\n",
            'f.yaml:2: EndpointSlice default/e: apiVersion must be discovery.k8s.io/v1, not "discovery.k8s.io/v1beta1"',
        ),
        (
            "kind: EndpointSlice\napiVersion: v1\nmetadata: {name: e}\n",
            'f.yaml:2: EndpointSlice default/e: apiVersion must be discovery.k8s.io/v1, not "v1"',
        ),
        (
            "kind: Service\nmetadata: {name: web}\n",
            "f.yaml:1: Service default/web: apiVersion is missing (must be v1)",
        ),
        (
            'kind: Node\napiVersion: v1\nmetadata: {name: "a\\nb"}\n',
            "f.yaml:3: Node a b: metadata.name must be a lowercase RFC 1123 subdomain (up to 253 letters, "
            "digits, '-' and '.'), "
            'not "a\\nb"',
        ),
        ("a: b\n", "f.yaml:1: kind is missing"),
        ("kind: [v1]\n", 'f.yaml:1: kind must be a string, not ["v1"]'),
        ("- a\n", 'f.yaml:1: must be a Kubernetes object, not ["a"]'),
        ("just words\n", 'f.yaml:1: must be a Kubernetes object, not "just words"'),
        ("# nothing\n", "f.yaml: contains no Kubernetes objects"),
        ("", "f.yaml: contains no Kubernetes objects"),
        ("kind: List\nitems:\n- 3\n", "f.yaml:3: must be a Kubernetes object, not 3"),
        (
            "kind: List\nitems:\n- metadata: {name: a}\n",
            "f.yaml:3: kind is missing",
        ),
        ("kind: ServiceList\nitems: {}\n", "f.yaml:2: items must be a list, not {}"),
        ("a: [\n", "f.yaml:2:1: not valid YAML: while parsing a flow node did not find expected node content"),
    ],
)
def test_problem_is_one_line_with_position_object_and_field(content: str, message: str) -> None:
    assert problems("f.yaml", content) == [message]


def test_json_problems_have_line_numbers_and_all_objects_are_checked() -> None:
    items = [service("a", ports=[{"port": "x"}]), service("b"), service("c", None, clusterIPs=["10.0.0.300"])]
    content = json.dumps({"kind": "ServiceList", "apiVersion": "v1", "items": items}, indent=1)
    line_a, line_c = (content.split(f'"{field}":')[0].count("\n") + 1 for field in ("port", "clusterIPs"))
    assert problems("f.json", content) == [
        f'f.json:{line_a}: Service demo/a: spec.ports[0].port must be an integer, not "x"',
        f'f.json:{line_c + 1}: Service default/c: spec.clusterIPs[0] must be an IP address, not "10.0.0.300"',
    ]


def test_json_syntax_error_has_line_and_column() -> None:
    assert problems("f.json", '{"kind":\n "List",}') == ["f.json:2:9: not valid JSON: trailing comma in object"]


PATHS = ["kind", "apiVersion", "metadata", "metadata.name", "metadata.labels", "metadata.namespace", "spec", "items"]
PATHS += [
    "spec.ports",
    "spec.clusterIP",
    "spec.externalIPs",
    "spec.sessionAffinityConfig",
    "status",
    "endpoints",
    "spec.cidrs",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
)


@given(
    st.sampled_from(["Service", "EndpointSlice", "Node", "ServiceCIDR", "ServiceList"]), st.sampled_from(PATHS), VALUES
)
@example("Service", "metadata.labels", {"\n": None})
def test_any_field_value_is_accepted_or_reported_as_a_problem(kind: str, field: str, value: object) -> None:
    version = {"EndpointSlice": "discovery.k8s.io/v1", "ServiceCIDR": "networking.k8s.io/v1"}.get(kind, "v1")
    item: dict[str, Any] = {"apiVersion": version, "kind": kind, "metadata": {"name": "a"}, "spec": {}}
    *parents, last = field.split(".")
    mapping = item
    for parent in parents:
        mapping = mapping[parent]
    mapping[last] = value
    for problem in problems("f.yaml", manifest(item).decode()):
        assert problem.startswith("f.yaml:")
        assert problem.isprintable()


def test_file_with_a_problem_contributes_no_objects() -> None:
    loaded = load_objects({"a.yaml": manifest(service("a"), {"kind": "Service"}), "b.yaml": manifest(service("b"))})
    assert len(loaded.problems) == 1
    assert object_names(loaded.replacements)[0] == ["b"]


# Which files are read


def test_only_visible_object_files_directly_in_a_directory_are_read(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.json", "c.yml", ".d.yaml", "notes.txt", "e.yaml~", "f.yaml.swp"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "sub.yaml" / "g.yaml").write_text("g")
    os.mkfifo(tmp_path / "pipe.yaml")
    reading = read_path(str(tmp_path))
    assert reading.problem is None
    assert reading.files == {str(tmp_path / name): name.encode() for name in ("a.json", "b.yaml", "c.yml")}


def test_explicitly_named_file_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / ".objects"
    path.write_bytes(manifest(service("a")))
    assert read_path(str(path)).files == {str(path): path.read_bytes()}


def test_unreadable_paths_are_reported(tmp_path: Path) -> None:
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    files = read_path(str(tmp_path)).files
    assert [str(problem) for problem in files.values()] == [
        f"{tmp_path}/gone.yaml: dangling symbolic link",
        f"{tmp_path}/loop.yaml: cannot be read: too many levels of symbolic links",
    ]
    missing = read_path(str(tmp_path / "missing"))
    assert str(missing.problem) == f"{tmp_path}/missing: cannot be read: no such file or directory"
    (tmp_path / "empty").mkdir()
    empty = read_path(str(tmp_path / "empty"))
    assert str(empty.problem) == f"{tmp_path}/empty: directory contains no object files (*.json, *.yaml, *.yml)"


def loaded_once(path: Path) -> list[Delta]:
    deltas: list[Delta] = []
    FileSource(str(path), deltas.extend).load_once()
    return deltas


def test_load_once_delivers_all_kinds(tmp_path: Path) -> None:
    for path in (GOLDEN / "clusterip").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "servicecidrs.yaml").write_bytes(manifest(service_cidr("kubernetes", "10.96.0.0/16")))
    deltas = loaded_once(tmp_path)
    assert all(isinstance(delta, Replace) and delta.objects for delta in deltas)
    assert [delta.kind for delta in deltas if isinstance(delta, Replace)] == KINDS


def test_load_once_delivers_empty_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: List\napiVersion: v1\nitems: []\n")
    assert loaded_once(tmp_path) == [Replace(kind, ()) for kind in KINDS]


def test_load_once_reports_all_problems_and_delivers_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_bytes(manifest(service("b")))
    (tmp_path / "c.yaml").write_text("kind: Service")
    deltas: list[Delta] = []
    with pytest.raises(FileSourceError) as caught:
        FileSource(str(tmp_path), deltas.extend).load_once()
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        f"{tmp_path}/a.yaml",
        f"{tmp_path}/c.yaml",
    ]
    assert deltas == []
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "missing", "missing.yaml"):
        with pytest.raises(FileSourceError, match=f"^{tmp_path}/{missing}: "):
            FileSource(str(tmp_path / missing), deltas.extend).load_once()


# Updates from changed files

VALID = manifest(service("a"))
INVALID = b"a: ["


def test_nothing_is_delivered_until_all_files_are_valid() -> None:
    state = ManifestState()
    first = state.update(PathSnapshot({"a.yaml": VALID, "b.yaml": INVALID}))
    assert (first.replacements, len(first.problems)) == ((), 1)
    # the valid content of a.yaml was never delivered, so it does not count now that a.yaml is invalid
    second = state.update(PathSnapshot({"a.yaml": INVALID, "b.yaml": manifest(service("b"))}))
    assert (second.replacements, len(second.problems)) == ((), 1)
    third = state.update(PathSnapshot({"a.yaml": VALID, "b.yaml": manifest(service("b"))}))
    assert object_names(third.replacements) == [["a", "b"], [], [], []]


def test_invalid_file_keeps_its_last_valid_state_and_others_are_updated() -> None:
    state = ManifestState()
    state.update(PathSnapshot({"a.yaml": VALID, "b.yaml": manifest(service("b"))}))
    broken = state.update(PathSnapshot({"a.yaml": INVALID, "b.yaml": manifest(service("b2"))}))
    assert object_names(broken.replacements)[0] == ["a", "b2"]
    assert [problem.path for problem in broken.problems] == ["a.yaml"]
    unreadable = FileProblem("a.yaml", "cannot be read")
    still = state.update(PathSnapshot({"a.yaml": unreadable, "b.yaml": manifest(service("b3"))}))
    assert object_names(still.replacements)[0] == ["a", "b3"]
    assert still.problems == (unreadable,)
    gone = state.update(PathSnapshot({"b.yaml": manifest(service("b3"))}))
    assert object_names(gone.replacements)[0] == ["b3"]


def test_invalid_object_keeps_its_last_valid_state_and_others_in_the_file_are_updated() -> None:
    store, state = Store("node-1"), ManifestState()

    def update(*objects: dict[str, Any]) -> tuple[list[str], int, int]:
        result = state.update(PathSnapshot({"a.yaml": manifest(*objects)}))
        for replacement in result.replacements:
            store.apply(replacement)
        return sorted(store.service_keys()), store.invalid_services, len(result.problems)

    bad = service("bad", ports=[{"port": 70_000}])
    assert update(service("a"), bad) == (["demo/a"], 1, 1)
    assert update(service("a"), service("bad")) == (["demo/a", "demo/bad"], 0, 0)
    assert update(service("b"), bad, service("c", externalIPs=["127.0.0.1"])) == (["demo/b", "demo/bad"], 2, 2)
    assert store.service("demo/bad") == Service("demo", "bad", ("10.96.0.10",), (ServicePort("", 80, "TCP"),))
    assert update(service("b")) == (["demo/b"], 0, 0)


def test_valid_definition_of_an_object_in_another_file_is_used() -> None:
    bad = service("a", ports=[{"port": 70_000}])
    update = ManifestState().update(PathSnapshot({"a.yaml": manifest(service("a")), "b.yaml": manifest(bad)}))
    assert object_names(update.replacements)[0] == ["a"]
    assert update.replacements[0].unreadable == ()
    assert len(update.problems) == 1


def test_load_once_delivers_nothing_if_an_object_is_invalid(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(manifest(service("a"), service("bad", ports=[{"port": 70_000}])))
    deltas: list[Delta] = []
    with pytest.raises(FileSourceError, match=r"Service demo/bad: spec\.ports"):
        FileSource(str(tmp_path), deltas.extend).load_once()
    assert deltas == []


def test_new_invalid_file_is_ignored() -> None:
    state = ManifestState()
    state.update(PathSnapshot({"a.yaml": VALID}))
    update = state.update(PathSnapshot({"a.yaml": VALID, "new.yaml": INVALID}))
    assert update.replacements == ()
    assert len(update.problems) == 1


def test_objects_are_kept_while_only_invalid_files_remain() -> None:
    state = ManifestState()
    state.update(PathSnapshot({"a.yaml": VALID}))
    assert state.update(PathSnapshot({"new.yaml": b""})).replacements == ()
    update = state.update(PathSnapshot({"new.yaml": manifest(service("b"))}))
    assert object_names(update.replacements)[0] == ["b"]


def test_unchanged_objects_are_not_delivered_again() -> None:
    state = ManifestState()
    assert state.update(PathSnapshot({"a.yaml": VALID})).replacements
    assert not state.update(PathSnapshot({"a.yaml": VALID})).replacements
    assert not state.update(PathSnapshot({"a.yaml": VALID + b"# a comment\n"})).replacements
    assert state.update(PathSnapshot({"a.yaml": manifest(service("b"))})).replacements


def test_objects_are_kept_without_files_but_deleted_by_an_empty_list() -> None:
    state = ManifestState()
    state.update(PathSnapshot({"a.yaml": VALID}))
    trouble = FileProblem("objects", "directory contains no object files")
    assert state.update(PathSnapshot({}, trouble)) == file_source.ManifestUpdate(problems=(trouble,))
    emptied = state.update(PathSnapshot({"a.yaml": b"kind: List\nitems: []\n"}))
    assert object_names(emptied.replacements) == [[], [], [], []]
    assert not emptied.problems


# Watching real files


class RunningSource:
    """A started file source; `services` waits for the next delivery."""

    def __init__(self, path: Path) -> None:
        self.batches: queue.Queue[tuple[Delta, ...]] = queue.Queue()
        self.source = FileSource(str(path), self.batches.put)
        self.source.start()

    def services(self) -> list[str]:
        batch = self.batches.get(timeout=HANG_GUARD)
        assert [delta.kind for delta in batch if isinstance(delta, Replace)] == KINDS
        first = batch[0]
        assert isinstance(first, Replace)
        return [item.name for item in first.objects]


class LogLines(logging.Handler):
    """A queue of log lines that a test can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self._queue.put(f"{record.levelname} {record.getMessage()}")

    def next(self) -> str:
        return self._queue.get(timeout=HANG_GUARD)

    def is_empty(self) -> bool:
        return self._queue.empty()


@pytest.fixture
def log_lines() -> Iterator[LogLines]:
    handler = LogLines()
    logger = logging.getLogger("kproxy")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def start_source() -> Iterator[Any]:
    sources: list[RunningSource] = []

    def start(path: Path) -> RunningSource:
        sources.append(RunningSource(path))
        return sources[-1]

    yield start
    for running in sources:
        running.source.stop(HANG_GUARD)
    assert not [thread for thread in threading.enumerate() if thread.name == "file-source"]


def renamed_into(path: Path, content: bytes) -> None:
    temporary = path.with_name(".temporary")
    temporary.write_bytes(content)
    temporary.rename(path)


def test_detects_files_that_are_written_renamed_linked_and_deleted(
    tmp_path: Path, start_source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_watch, "SETTLE_TIMEOUT", 2 * HANG_GUARD)
    directory = tmp_path / "objects"
    directory.mkdir()
    (directory / "a.yaml").write_bytes(manifest(service("a")))
    running = start_source(directory)
    assert running.services() == ["a"]
    (directory / "a.yaml").write_bytes(manifest(service("a2")))
    assert running.services() == ["a2"]
    renamed_into(directory / "b.yaml", manifest(service("b")))
    assert running.services() == ["a2", "b"]
    target = tmp_path / "elsewhere" / "c"
    target.parent.mkdir()
    target.write_bytes(manifest(service("c")))
    os.link(target, directory / "c.yaml")
    assert running.services() == ["a2", "b", "c"]
    (directory / "c.yaml").unlink()
    assert running.services() == ["a2", "b"]
    (directory / "d.yaml").symlink_to(target)
    assert running.services() == ["a2", "b", "c"]
    target.write_bytes(manifest(service("c2")))
    assert running.services() == ["a2", "b", "c2"]


def test_single_file_is_watched_through_its_directory(tmp_path: Path, start_source: Any) -> None:
    path = tmp_path / "objects"
    path.write_bytes(manifest(service("a")))
    running = start_source(path)
    assert running.services() == ["a"]
    renamed_into(path, manifest(service("b")))
    assert running.services() == ["b"]
    path.unlink()
    path.write_bytes(manifest(service("c")))
    assert running.services() == ["c"]


def test_files_are_not_read_while_one_is_being_written(tmp_path: Path, start_source: Any, log_lines: LogLines) -> None:
    (tmp_path / "a.yaml").write_bytes(manifest(service("a")))
    (tmp_path / "b.yaml").write_bytes(manifest(service("b")))
    running = start_source(tmp_path)
    assert running.services() == ["a", "b"]
    with (tmp_path / "b.yaml").open("wb", buffering=0) as b, (tmp_path / "c.yaml").open("wb", buffering=0) as c:
        b.write(INVALID)
        c.write(INVALID)
        renamed_into(tmp_path / "a.yaml", manifest(service("a2")))
        b.seek(0)
        b.write(manifest(service("b2")))
        c.seek(0)
        c.write(manifest(service("c")))
    assert running.services() == ["a2", "b2", "c"]
    assert log_lines.is_empty()


def test_mounted_configmap_is_watched(tmp_path: Path, start_source: Any) -> None:
    def publish(version: str, *services: str) -> None:
        data = tmp_path / f"..{version}"
        data.mkdir()
        for name in services:
            (data / f"{name}.yaml").write_bytes(manifest(service(f"{name}-{version}")))
        (tmp_path / "..data_tmp").symlink_to(data.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("v1", "a", "b")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    running = start_source(tmp_path)
    assert running.services() == ["a-v1", "b-v1"]
    publish("v2", "a", "b")
    assert running.services() == ["a-v2", "b-v2"]
    single = start_source(tmp_path / "b.yaml")
    assert single.services() == ["b-v2"]
    publish("v3", "a", "b")
    assert single.services() == ["b-v3"]


def test_directory_may_appear_late_disappear_and_reappear(
    tmp_path: Path, start_source: Any, log_lines: LogLines
) -> None:
    directory = tmp_path / "in" / "here"
    running = start_source(directory)
    assert log_lines.next() == f"ERROR {directory}: cannot be read: no such file or directory"
    directory.mkdir(parents=True)
    (directory / "a.yaml").write_bytes(manifest(service("a")))
    assert running.services() == ["a"]
    os.rename(tmp_path / "in", tmp_path / "away")
    directory.mkdir(parents=True)
    (directory / "b.yaml").write_bytes(manifest(service("b")))
    assert running.services() == ["b"]


def test_emptied_directory_deletes_nothing_and_is_reported_once(
    tmp_path: Path, start_source: Any, log_lines: LogLines
) -> None:
    (tmp_path / "a.yaml").write_bytes(manifest(service("a")))
    running = start_source(tmp_path)
    assert running.services() == ["a"]
    (tmp_path / "a.yaml").unlink()
    assert log_lines.next() == f"ERROR {tmp_path}: directory contains no object files (*.json, *.yaml, *.yml)"
    (tmp_path / "notes.txt").write_text("another event, the same problem")
    (tmp_path / "b.yaml").write_bytes(manifest(service("b")))
    assert running.services() == ["b"]
    assert log_lines.next() == f"INFO {tmp_path}: all object files are valid"
    assert log_lines.is_empty()


def test_invalid_file_is_reported_once_and_keeps_its_last_state(
    tmp_path: Path, start_source: Any, log_lines: LogLines
) -> None:
    (tmp_path / "a.yaml").write_bytes(INVALID)
    running = start_source(tmp_path)
    assert log_lines.next().startswith(f"ERROR {tmp_path}/a.yaml:2:1: not valid YAML: ")
    (tmp_path / "b.yaml").write_bytes(manifest(service("b")))
    (tmp_path / "a.yaml").write_bytes(manifest(service("a")))
    assert running.services() == ["a", "b"]
    assert log_lines.next() == f"INFO {tmp_path}: all object files are valid"
    (tmp_path / "a.yaml").write_text("kind: Service\n")
    assert log_lines.next().startswith(f"ERROR {tmp_path}/a.yaml:1: Service: ")
    (tmp_path / "b.yaml").write_bytes(manifest(service("b2")))
    assert running.services() == ["a", "b2"]
    assert log_lines.is_empty()
    assert running.batches.empty()


def test_stop_before_start_and_repeated_stop_have_no_effect(tmp_path: Path, start_source: Any) -> None:
    FileSource(str(tmp_path), lambda _: None).stop(HANG_GUARD)
    (tmp_path / "a.yaml").write_bytes(VALID)
    running = start_source(tmp_path)
    running.services()
    running.source.stop(HANG_GUARD)
    running.source.stop(HANG_GUARD)
    renamed_into(tmp_path / "a.yaml", manifest(service("b")))
    assert running.batches.empty()


def test_files_are_polled_without_inotify(
    tmp_path: Path, start_source: Any, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Inotify:
        raise InotifyError(24, "Too many open files")

    monkeypatch.setattr(document_watch, "Inotify", fail)
    monkeypatch.setattr(file_source, "RELOAD_PERIOD", 0.01)
    (tmp_path / "a.yaml").write_bytes(manifest(service("a")))
    running = start_source(tmp_path)
    assert running.services() == ["a"]
    assert "cannot watch for changes (Too many open files)" in log_lines.next()
    renamed_into(tmp_path / "a.yaml", manifest(service("b")))
    assert running.services() == ["b"]


def test_inotify_is_used_again_once_it_works(
    tmp_path: Path, start_source: Any, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: queue.SimpleQueue[bool] = queue.SimpleQueue()
    failures = [True, True, True]

    def scarce() -> Inotify:
        attempts.put(bool(failures))
        if failures:
            failures.pop()
            raise InotifyError(24, "Too many open files")
        return Inotify()

    monkeypatch.setattr(document_watch, "Inotify", scarce)
    monkeypatch.setattr(file_source, "RELOAD_PERIOD", 0.01)
    (tmp_path / "a.yaml").write_bytes(manifest(service("a")))
    running = start_source(tmp_path)
    assert running.services() == ["a"]
    assert [attempts.get(timeout=HANG_GUARD) for _ in range(4)] == [True, True, True, False]
    renamed_into(tmp_path / "a.yaml", manifest(service("b")))
    assert running.services() == ["b"]
    assert attempts.empty(), "the change was detected without another attempt"
    assert "cannot watch for changes (Too many open files)" in log_lines.next()
    assert log_lines.is_empty()


def test_objects_are_delivered_again_after_an_unexpected_error(
    tmp_path: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kproxy.model.restarts.FIRST_DELAY", 0.01)
    (tmp_path / "a.yaml").write_bytes(VALID)
    failures: list[Exception] = [MemoryError("no memory")]
    delivered: queue.SimpleQueue[tuple[Delta, ...]] = queue.SimpleQueue()

    def sink(deltas: tuple[Delta, ...]) -> None:
        if failures:
            raise failures.pop()
        delivered.put(deltas)

    source = FileSource(str(tmp_path), sink)
    source.start()
    assert [delta.kind for delta in delivered.get(timeout=HANG_GUARD) if isinstance(delta, Replace)] == KINDS
    assert log_lines.next() == f"ERROR file-source: {tmp_path}: unexpected MemoryError('no memory'); trying again"
    source.stop(HANG_GUARD)
    assert delivered.empty()


OUT_OF_DESCRIPTORS = """
import os, queue, resource, sys
from kproxy.documents import watch
from kproxy.kube.manifests.file_source import FileSource

watch.FIRST_RETRY = 0.05
path, new, late = sys.argv[1:]
batches = queue.Queue()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
used = []


def use_up():
    try:
        while True:
            used.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass


def give_back():
    while used:
        os.close(used.pop())


source = FileSource(path, batches.put)
if late == "late":
    use_up()
    os.close(used.pop())  # for the eventfd that wakes the thread, but none is left for inotify
source.start()
if late != "late":
    print(len(batches.get(timeout=30)[0].objects))
    use_up()
    os.rename(new, f"{path}/b.json")
while not source.status():
    source._watcher._stopping.wait(0.01)
give_back()
print(len(batches.get(timeout=30)[0].objects))
while source.status():
    source._watcher._stopping.wait(0.01)
source.stop(30)
"""


@pytest.mark.parametrize("moment", ["while watching", "late"])
def test_files_are_read_when_descriptors_are_available_again(tmp_path: Path, moment: str) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    (objects / "a.json").write_bytes(json.dumps(service("a")).encode())
    new = tmp_path / "new.json"
    new.write_bytes(json.dumps(service("b")).encode())
    command = [sys.executable, "-c", OUT_OF_DESCRIPTORS, str(objects), str(new), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["1"] if moment == "late" else ["1", "2"]), done.stderr


# inotify


def test_inotify_watch_returns_whether_a_directory_is_new(tmp_path: Path) -> None:
    directory = tmp_path / "folder"
    directory.mkdir()
    with Inotify() as inotify:
        assert inotify.read() == []
        assert inotify.watch([str(directory), str(tmp_path / "missing")])
        assert not inotify.watch([str(directory)])
        (directory / "ä").write_text("x")
        assert {(event.directory, event.name) for event in inotify.read()} == {(str(directory), "ä")}
        assert inotify.watch([str(tmp_path)])
        (directory / "b").write_text("x")  # no longer watched
        assert inotify.read() == []
        inotify.watch([str(directory)])
        (directory / "ä").unlink()
        (directory / "b").unlink()
        directory.rmdir()
        inotify.read()
        directory.mkdir()
        assert inotify.watch([str(directory)])
        descriptor = inotify.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


class Reader:
    """A reader of `path` that is driven step by step."""

    def __init__(self, path: Path, inotify: Inotify) -> None:
        self.wake = os.eventfd(0)
        self.reader = SettledReader(str(path), inotify, self.wake)
        self.snapshots: queue.Queue[PathSnapshot] = queue.Queue()

    def read_after_wait(self) -> threading.Thread:
        def read() -> None:
            self.reader.wait()
            self.snapshots.put(self.reader.read())

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


def test_read_waits_for_a_write_to_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_watch, "SETTLE_TIMEOUT", HANG_GUARD)
    waits = threading.Event()

    class Observed(SettledReader):
        def _wait_for_events(self, seconds: float | None) -> bool:
            waits.set()
            return super()._wait_for_events(seconds)

    path = tmp_path / "a.yaml"
    path.write_bytes(VALID)
    snapshots: queue.Queue[PathSnapshot] = queue.Queue()
    wake = os.eventfd(0)
    with Inotify() as inotify:
        reader = Observed(str(tmp_path), inotify, wake)
        with path.open("wb", buffering=0) as file:
            file.write(b"# half")
            thread = threading.Thread(target=lambda: snapshots.put(reader.read()), daemon=True)
            thread.start()
            assert waits.wait(HANG_GUARD)
            file.write(b" and half")
        assert snapshots.get(timeout=HANG_GUARD).files == {str(path): b"# half and half"}
        thread.join(HANG_GUARD)
    os.close(wake)


def test_read_does_not_wait_forever_for_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_watch, "SETTLE_TIMEOUT", 0.05)
    path = tmp_path / "a.yaml"
    path.write_bytes(VALID)
    with Inotify() as inotify, path.open("ab", buffering=0) as file:
        reader = Reader(tmp_path, inotify)
        assert reader.reader.read().files == {str(path): VALID}
        thread = reader.read_after_wait()
        file.write(b"# more")
        assert reader.snapshots.get(timeout=HANG_GUARD).files == {str(path): VALID + b"# more"}
        thread.join(HANG_GUARD)
        os.close(reader.wake)


def test_only_relevant_events_cause_a_reread(tmp_path: Path) -> None:
    directory = tmp_path / "objects"
    directory.mkdir()
    (directory / "a.yaml").write_bytes(VALID)
    with Inotify() as inotify:
        paths = find_watched_paths(str(directory))
        assert paths.directories == (str(tmp_path), str(directory))
        inotify.watch(paths.directories)

        def relevant_events() -> list[str]:
            return [event.name for event in inotify.read() if paths.requires_read(event)]

        (tmp_path / "log").write_text("next to the folder")
        (tmp_path / "log").unlink()
        with (directory / "notes.txt").open("w") as notes:
            relevant_events()  # discard the creation
            notes.write("not an object file")
        (directory / ".hidden.yaml").write_text("")
        assert "notes.txt" not in relevant_events()
        directory.chmod(0o755)
        (directory / "a.yaml").chmod(0o600)
        assert set(relevant_events()) == {"objects", "a.yaml", ""}
        (directory / "a.yaml").rename(directory / "b.yaml")
        assert relevant_events() == ["a.yaml", "b.yaml"]
        directory.rename(tmp_path / "away")
        assert "objects" in relevant_events()


def test_watched_directories_of_a_missing_path_and_of_a_symlink(tmp_path: Path) -> None:
    missing = find_watched_paths(str(tmp_path / "x" / "y" / "z"))
    assert (missing.directories, missing.awaited) == ((str(tmp_path),), "x")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(VALID)
    (tmp_path / "link").symlink_to("real/file")
    link = find_watched_paths(str(tmp_path / "link"))
    assert link.directories == (str(tmp_path), str(tmp_path / "real"))
    assert link.awaited == ""
    assert link.files == {str(tmp_path / "link"), str(tmp_path / "real" / "file")}


def test_unusable_endpoints_are_reported_with_their_line() -> None:
    bad = """\
kind: EndpointSlice
apiVersion: discovery.k8s.io/v1
metadata: {name: web-1, namespace: demo, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 80}]
endpoints:
- addresses: [10.244.0.1]
- addresses: [fd00::1]
"""
    loaded = load_objects({"a.yaml": bad.encode()})
    assert loaded.warnings == (
        "a.yaml:8: EndpointSlice demo/web-1: ignoring unusable addresses and ports: "
        'endpoints[1].addresses[0] must be an IPv4 address, not "fd00::1"',
    )
    assert loaded.problems == ()
