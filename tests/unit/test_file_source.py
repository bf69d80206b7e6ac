from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from kproxy.documents import watch
from kproxy.documents.document import FileProblem
from kproxy.documents.watch import PathSnapshot, SettledReader, find_watched_paths, read_path
from kproxy.host.inotify import Inotify, InotifyError
from kproxy.kube.manifests import file_source
from kproxy.kube.manifests.file_source import FileSource, FileSourceError, ManifestState
from kproxy.kube.manifests.parse import load_objects, parse_file
from kproxy.model.delta import Delta, Kind, Replace
from kproxy.model.types import EndpointSlice, Node, Service, ServiceCIDR

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS: list[Kind] = [Service, EndpointSlice, Node, ServiceCIDR]
HANG = 20.0
"""Seconds after which a test that waits has hung."""


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


def text(*objects: dict[str, Any]) -> bytes:
    return yaml.safe_dump_all(objects).encode()


def problems(path: str, content: str) -> list[str]:
    return [str(problem) for problem in parse_file(path, content.encode()).problems]


def names(replacements: tuple[Replace, ...]) -> list[list[str]]:
    return [[item.name for item in replacement.objects] for replacement in replacements]


# What files may hold


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*/")), ids=lambda folder: folder.name)
def test_recorded_clusters_load_as_json_and_the_same_as_yaml(folder: Path) -> None:
    texts = {str(path): path.read_bytes() for path in folder.glob("*.json")}
    loaded = load_objects(texts)
    assert not loaded.problems
    assert not loaded.warnings
    assert loaded.notes == (
        f"{folder}/config.json: ignoring kubeproxy.config.k8s.io/v1alpha1 KubeProxyConfiguration: "
        "kproxy does not use this kind",
    )
    assert [replacement.kind for replacement in loaded.replacements] == KINDS
    assert [bool(replacement.objects) for replacement in loaded.replacements] == [True, True, True, False]
    as_yaml = {
        path.replace(".json", ".yaml"): yaml.safe_dump(json.loads(content)).encode() for path, content in texts.items()
    }
    assert load_objects(as_yaml).replacements == loaded.replacements


def test_lists_single_objects_and_several_documents_all_work() -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
    }
    loaded = load_objects(
        {
            "a.yaml": text({"apiVersion": "v1", "kind": "List", "items": [service("a"), node]}, endpoints),
            "b.json": json.dumps(service("b")).encode(),
            "c.json": json.dumps(
                {"apiVersion": "v1", "kind": "ServiceList", "items": [{"metadata": {"name": "headless"}}]}
            ).encode(),
            "d.yml": b"apiVersion: v1\nkind: NodeList\nitems:\n",
            "e.yaml": text(service_cidr("kubernetes", "10.96.0.0/16", "fd00::/108")),
            "f.yaml": text({**service_cidr("more", "10.97.0.0/16"), "apiVersion": "networking.k8s.io/v1beta1"}),
        }
    )
    assert not loaded.problems
    assert names(loaded.replacements) == [["a", "b"], ["web-1"], ["node-1"], ["kubernetes", "more"]]


def test_a_service_cidr_has_no_namespace_whatever_its_file_says() -> None:
    astray = service_cidr("kubernetes", "10.97.0.0/16")
    astray["metadata"]["namespace"] = "demo"
    loaded = load_objects({"a.yaml": text(service_cidr("kubernetes", "10.96.0.0/16")), "b.yaml": text(astray)})
    assert loaded.warnings == (
        "ServiceCIDR kubernetes is defined in a.yaml and in b.yaml; using the definition in b.yaml",
    )
    assert loaded.replacements[-1] == Replace(ServiceCIDR, (ServiceCIDR("kubernetes", ("10.97.0.0/16",)),))


def test_a_missing_namespace_is_default() -> None:
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
    }
    loaded = load_objects({"a.yaml": text(service("web", None)), "b.json": json.dumps(endpoints).encode()})
    (web,), (web_1,), *_ = (replacement.objects for replacement in loaded.replacements)
    assert isinstance(web, Service)
    assert web.key == "default/web"
    assert isinstance(web_1, EndpointSlice)
    assert (web_1.namespace, web_1.service) == ("default", "default/web")


def test_kinds_without_use_are_noted_once_a_file() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}
    old = {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "e"}}
    other = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "k"}}
    pods = {"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": {"name": "p"}}]}
    loaded = load_objects({"a.yaml": text(pod, pod, old, other, pods, service("a"))})
    assert not loaded.problems
    assert loaded.notes == (
        "a.yaml: ignoring v1 Pod: kproxy does not use this kind",
        "a.yaml: ignoring v1 Endpoints: kproxy does not use this kind",
        "a.yaml: ignoring serving.knative.dev/v1 Service: kproxy does not use this kind",
        "a.yaml: ignoring v1 PodList: kproxy does not use this kind",
    )
    assert names(loaded.replacements) == [["a"], [], [], []]


def test_of_an_object_in_two_files_the_later_is_taken_and_both_are_named() -> None:
    loaded = load_objects(
        {
            "b.yaml": text(service("web", clusterIP="10.96.0.2")),
            "a.yaml": text(service("web", clusterIP="10.96.0.1"), service("other")),
        }
    )
    assert loaded.warnings == ("Service demo/web is defined in a.yaml and in b.yaml; using the definition in b.yaml",)
    found = {item.name: item for item in loaded.replacements[0].objects}
    assert found.keys() == {"web", "other"}
    assert isinstance(found["web"], Service)
    assert found["web"].cluster_ips == ("10.96.0.2",)


def test_of_an_object_twice_in_a_file_the_last_is_taken() -> None:
    twice = text(service("web", clusterIP="10.96.0.1"), service("web", clusterIP="10.96.0.2"))
    loaded = load_objects({"a.yaml": twice})
    assert loaded.warnings == ("Service demo/web is defined more than once in a.yaml; using the last definition",)
    (web,) = loaded.replacements[0].objects
    assert isinstance(web, Service)
    assert web.cluster_ips == ("10.96.0.2",)


def test_a_headless_service_in_a_later_file_takes_the_place_of_one_with_rules() -> None:
    loaded = load_objects({"a.yaml": text(service("web")), "b.yaml": text(service("web", clusterIP="None"))})
    assert loaded.replacements[0].objects == ()
    assert len(loaded.warnings) == 1


# What is wrong with files

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
            "f.yaml:3: Node a b: metadata.name must be a lowercase RFC 1123 subdomain (letters, digits, '-' and '.'), "
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
def test_a_problem_is_one_line_with_place_object_and_field(content: str, message: str) -> None:
    assert problems("f.yaml", content) == [message]


def test_problems_in_json_have_lines_too_and_all_objects_are_checked() -> None:
    items = [service("a", ports=[{"port": "x"}]), service("b"), service("c", None, clusterIPs=["10.0.0.300"])]
    content = json.dumps({"kind": "ServiceList", "apiVersion": "v1", "items": items}, indent=1)
    line_a, line_c = (content.split(f'"{field}":')[0].count("\n") + 1 for field in ("port", "clusterIPs"))
    assert problems("f.json", content) == [
        f'f.json:{line_a}: Service demo/a: spec.ports[0].port must be an integer, not "x"',
        f'f.json:{line_c + 1}: Service default/c: spec.clusterIPs[0] must be an IP address, not "10.0.0.300"',
    ]


def test_a_syntax_error_in_json_has_line_and_column() -> None:
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
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
)


@given(
    st.sampled_from(["Service", "EndpointSlice", "Node", "ServiceCIDR", "ServiceList"]), st.sampled_from(PATHS), VALUES
)
@example("Service", "metadata.labels", {"\n": None})
def test_no_value_of_any_field_brings_an_error_that_is_no_problem(kind: str, field: str, value: object) -> None:
    version = {"EndpointSlice": "discovery.k8s.io/v1", "ServiceCIDR": "networking.k8s.io/v1"}.get(kind, "v1")
    item: dict[str, Any] = {"apiVersion": version, "kind": kind, "metadata": {"name": "a"}, "spec": {}}
    *parents, last = field.split(".")
    holder = item
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    for problem in parse_file("f.yaml", text(item)).problems:
        assert str(problem).startswith("f.yaml:")
        assert "\n" not in str(problem)


def test_a_file_with_a_problem_gives_no_objects() -> None:
    loaded = load_objects({"a.yaml": text(service("a"), {"kind": "Service"}), "b.yaml": text(service("b"))})
    assert len(loaded.problems) == 1
    assert names(loaded.replacements)[0] == ["b"]


# Which files are read


def test_a_folder_is_read_flat_and_without_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.json", "c.yml", ".d.yaml", "notes.txt", "e.yaml~", "f.yaml.swp"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub.yaml").mkdir()
    (tmp_path / "sub.yaml" / "g.yaml").write_text("g")
    os.mkfifo(tmp_path / "pipe.yaml")
    reading = read_path(str(tmp_path))
    assert reading.trouble is None
    assert reading.files == {str(tmp_path / name): name.encode() for name in ("a.json", "b.yaml", "c.yml")}


def test_a_file_given_by_name_may_be_called_anything(tmp_path: Path) -> None:
    path = tmp_path / ".objects"
    path.write_bytes(text(service("a")))
    assert read_path(str(path)).files == {str(path): path.read_bytes()}


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    files = read_path(str(tmp_path)).files
    assert [str(problem) for problem in files.values()] == [
        f"{tmp_path}/gone.yaml: dangling symbolic link",
        f"{tmp_path}/loop.yaml: cannot be read: too many levels of symbolic links",
    ]
    missing = read_path(str(tmp_path / "missing"))
    assert str(missing.trouble) == f"{tmp_path}/missing: cannot be read: no such file or directory"
    (tmp_path / "empty").mkdir()
    empty = read_path(str(tmp_path / "empty"))
    assert str(empty.trouble) == f"{tmp_path}/empty: directory contains no object files (*.json, *.yaml, *.yml)"


def loaded_once(path: Path) -> list[Delta]:
    found: list[Delta] = []
    FileSource(str(path), found.extend).load_once()
    return found


def test_load_once_hands_on_all_kinds(tmp_path: Path) -> None:
    for path in (GOLDEN / "clusterip").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "servicecidrs.yaml").write_bytes(text(service_cidr("kubernetes", "10.96.0.0/16")))
    found = loaded_once(tmp_path)
    assert all(isinstance(delta, Replace) and delta.objects for delta in found)
    assert [delta.kind for delta in found if isinstance(delta, Replace)] == KINDS


def test_load_once_hands_on_empty_kinds_too(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: List\napiVersion: v1\nitems: []\n")
    assert loaded_once(tmp_path) == [Replace(kind, ()) for kind in KINDS]


def test_load_once_raises_for_all_problems_and_hands_nothing_on(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_bytes(text(service("b")))
    (tmp_path / "c.yaml").write_text("kind: Service")
    found: list[Delta] = []
    with pytest.raises(FileSourceError) as caught:
        FileSource(str(tmp_path), found.extend).load_once()
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        f"{tmp_path}/a.yaml",
        f"{tmp_path}/c.yaml",
    ]
    assert found == []
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "missing", "missing.yaml"):
        with pytest.raises(FileSourceError, match=f"^{tmp_path}/{missing}: "):
            FileSource(str(tmp_path / missing), found.extend).load_once()


# What changed files mean

GOOD = text(service("a"))
BROKEN = b"a: ["


def test_nothing_is_handed_on_before_all_files_are_good() -> None:
    following = ManifestState()
    first = following.update(PathSnapshot({"a.yaml": GOOD, "b.yaml": BROKEN}))
    assert (first.replacements, len(first.problems)) == ((), 1)
    # a.yaml was good, but is not now: what it was does not count yet
    second = following.update(PathSnapshot({"a.yaml": BROKEN, "b.yaml": text(service("b"))}))
    assert (second.replacements, len(second.problems)) == ((), 1)
    third = following.update(PathSnapshot({"a.yaml": GOOD, "b.yaml": text(service("b"))}))
    assert names(third.replacements) == [["a", "b"], [], [], []]


def test_a_file_that_breaks_stays_in_force_as_it_was_and_others_are_followed() -> None:
    following = ManifestState()
    following.update(PathSnapshot({"a.yaml": GOOD, "b.yaml": text(service("b"))}))
    broken = following.update(PathSnapshot({"a.yaml": BROKEN, "b.yaml": text(service("b2"))}))
    assert names(broken.replacements)[0] == ["a", "b2"]
    assert [problem.path for problem in broken.problems] == ["a.yaml"]
    unreadable = FileProblem("a.yaml", "cannot be read")
    still = following.update(PathSnapshot({"a.yaml": unreadable, "b.yaml": text(service("b3"))}))
    assert names(still.replacements)[0] == ["a", "b3"]
    assert still.problems == (unreadable,)
    gone = following.update(PathSnapshot({"b.yaml": text(service("b3"))}))
    assert names(gone.replacements)[0] == ["b3"]


def test_a_new_file_that_is_broken_counts_as_absent() -> None:
    following = ManifestState()
    following.update(PathSnapshot({"a.yaml": GOOD}))
    update = following.update(PathSnapshot({"a.yaml": GOOD, "new.yaml": BROKEN}))
    assert update.replacements == ()
    assert len(update.problems) == 1


def test_when_only_broken_files_are_left_everything_stays() -> None:
    following = ManifestState()
    following.update(PathSnapshot({"a.yaml": GOOD}))
    assert following.update(PathSnapshot({"new.yaml": b""})).replacements == ()
    update = following.update(PathSnapshot({"new.yaml": text(service("b"))}))
    assert names(update.replacements)[0] == ["b"]


def test_what_changes_nothing_is_not_handed_on() -> None:
    following = ManifestState()
    assert following.update(PathSnapshot({"a.yaml": GOOD})).replacements
    assert not following.update(PathSnapshot({"a.yaml": GOOD})).replacements
    assert not following.update(PathSnapshot({"a.yaml": GOOD + b"# a comment\n"})).replacements
    assert following.update(PathSnapshot({"a.yaml": text(service("b"))})).replacements


def test_without_any_file_everything_stays_but_an_empty_list_is_honoured() -> None:
    following = ManifestState()
    following.update(PathSnapshot({"a.yaml": GOOD}))
    trouble = FileProblem("objects", "no object files here")
    assert following.update(PathSnapshot({}, trouble)) == file_source.ManifestUpdate(problems=(trouble,))
    emptied = following.update(PathSnapshot({"a.yaml": b"kind: List\nitems: []\n"}))
    assert names(emptied.replacements) == [[], [], [], []]
    assert not emptied.problems


# Following real files


class Followed:
    """A running source; `services` waits for the next set of Services."""

    def __init__(self, path: Path) -> None:
        self.batches: queue.Queue[tuple[Delta, ...]] = queue.Queue()
        self.source = FileSource(str(path), self.batches.put)
        self.source.start()

    def services(self) -> list[str]:
        found = self.batches.get(timeout=HANG)
        assert [delta.kind for delta in found if isinstance(delta, Replace)] == KINDS
        first = found[0]
        assert isinstance(first, Replace)
        return [item.name for item in first.objects]


class Lines(logging.Handler):
    """Makes log lines something to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put(f"{record.levelname} {record.getMessage()}")

    def next(self) -> str:
        return self.lines.get(timeout=HANG)


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("kproxy")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def follow() -> Iterator[Any]:
    running: list[Followed] = []

    def start(path: Path) -> Followed:
        running.append(Followed(path))
        return running[-1]

    yield start
    for followed in running:
        followed.source.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "file-source"]


def renamed_into(path: Path, content: bytes) -> None:
    temporary = path.with_name(".temporary")
    temporary.write_bytes(content)
    temporary.rename(path)


def test_files_written_in_place_renamed_linked_and_deleted_are_noticed(
    tmp_path: Path, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SETTLE_TIMEOUT", 2 * HANG)
    folder = tmp_path / "objects"
    folder.mkdir()
    (folder / "a.yaml").write_bytes(text(service("a")))
    followed = follow(folder)
    assert followed.services() == ["a"]
    (folder / "a.yaml").write_bytes(text(service("a2")))
    assert followed.services() == ["a2"]
    renamed_into(folder / "b.yaml", text(service("b")))
    assert followed.services() == ["a2", "b"]
    target = tmp_path / "elsewhere" / "c"
    target.parent.mkdir()
    target.write_bytes(text(service("c")))
    os.link(target, folder / "c.yaml")
    assert followed.services() == ["a2", "b", "c"]
    (folder / "c.yaml").unlink()
    assert followed.services() == ["a2", "b"]
    (folder / "d.yaml").symlink_to(target)
    assert followed.services() == ["a2", "b", "c"]
    target.write_bytes(text(service("c2")))
    assert followed.services() == ["a2", "b", "c2"]


def test_a_single_file_is_followed_through_its_folder(tmp_path: Path, follow: Any) -> None:
    path = tmp_path / "objects"
    path.write_bytes(text(service("a")))
    followed = follow(path)
    assert followed.services() == ["a"]
    renamed_into(path, text(service("b")))
    assert followed.services() == ["b"]
    path.unlink()
    path.write_bytes(text(service("c")))
    assert followed.services() == ["c"]


def test_nothing_is_read_while_an_object_file_is_written(tmp_path: Path, follow: Any, lines: Lines) -> None:
    (tmp_path / "a.yaml").write_bytes(text(service("a")))
    (tmp_path / "b.yaml").write_bytes(text(service("b")))
    followed = follow(tmp_path)
    assert followed.services() == ["a", "b"]
    with (tmp_path / "b.yaml").open("wb", buffering=0) as b, (tmp_path / "c.yaml").open("wb", buffering=0) as c:
        b.write(BROKEN)
        c.write(BROKEN)
        renamed_into(tmp_path / "a.yaml", text(service("a2")))
        b.seek(0)
        b.write(text(service("b2")))
        c.seek(0)
        c.write(text(service("c")))
    assert followed.services() == ["a2", "b2", "c"]
    assert lines.lines.empty()


def test_a_mounted_configmap_is_followed(tmp_path: Path, follow: Any) -> None:
    def publish(version: str, *services: str) -> None:
        data = tmp_path / f"..{version}"
        data.mkdir()
        for name in services:
            (data / f"{name}.yaml").write_bytes(text(service(f"{name}-{version}")))
        (tmp_path / "..data_tmp").symlink_to(data.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("v1", "a", "b")
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")
    followed = follow(tmp_path)
    assert followed.services() == ["a-v1", "b-v1"]
    publish("v2", "a", "b")
    assert followed.services() == ["a-v2", "b-v2"]
    single = follow(tmp_path / "b.yaml")
    assert single.services() == ["b-v2"]
    publish("v3", "a", "b")
    assert single.services() == ["b-v3"]


def test_a_folder_may_come_late_go_and_come_back(tmp_path: Path, follow: Any, lines: Lines) -> None:
    folder = tmp_path / "in" / "here"
    followed = follow(folder)
    assert lines.next() == f"ERROR {folder}: cannot be read: no such file or directory"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_bytes(text(service("a")))
    assert followed.services() == ["a"]
    os.rename(tmp_path / "in", tmp_path / "away")
    folder.mkdir(parents=True)
    (folder / "b.yaml").write_bytes(text(service("b")))
    assert followed.services() == ["b"]


def test_an_emptied_folder_deletes_nothing_and_is_said_once(tmp_path: Path, follow: Any, lines: Lines) -> None:
    (tmp_path / "a.yaml").write_bytes(text(service("a")))
    followed = follow(tmp_path)
    assert followed.services() == ["a"]
    (tmp_path / "a.yaml").unlink()
    assert lines.next() == f"ERROR {tmp_path}: directory contains no object files (*.json, *.yaml, *.yml)"
    (tmp_path / "notes.txt").write_text("another notice, the same problem")
    (tmp_path / "b.yaml").write_bytes(text(service("b")))
    assert followed.services() == ["b"]
    assert lines.next() == f"INFO {tmp_path}: all object files are valid"
    assert lines.lines.empty()


def test_a_broken_file_is_said_once_and_kept_as_it_was(tmp_path: Path, follow: Any, lines: Lines) -> None:
    (tmp_path / "a.yaml").write_bytes(BROKEN)
    followed = follow(tmp_path)
    assert lines.next().startswith(f"ERROR {tmp_path}/a.yaml:2:1: not valid YAML: ")
    (tmp_path / "b.yaml").write_bytes(text(service("b")))
    (tmp_path / "a.yaml").write_bytes(text(service("a")))
    assert followed.services() == ["a", "b"]
    assert lines.next() == f"INFO {tmp_path}: all object files are valid"
    (tmp_path / "a.yaml").write_text("kind: Service\n")
    assert lines.next().startswith(f"ERROR {tmp_path}/a.yaml:1: Service: ")
    (tmp_path / "b.yaml").write_bytes(text(service("b2")))
    assert followed.services() == ["a", "b2"]
    assert lines.lines.empty()
    assert followed.batches.empty()


def test_stop_before_start_and_twice_does_nothing(tmp_path: Path, follow: Any) -> None:
    FileSource(str(tmp_path), lambda _: None).stop()
    (tmp_path / "a.yaml").write_bytes(GOOD)
    followed = follow(tmp_path)
    followed.services()
    followed.source.stop()
    followed.source.stop()
    renamed_into(tmp_path / "a.yaml", text(service("b")))
    assert followed.batches.empty()


def test_without_notices_the_files_are_read_again_and_again(
    tmp_path: Path, follow: Any, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Inotify:
        raise InotifyError(24, "Too many open files")

    monkeypatch.setattr(watch, "Inotify", refuse)
    monkeypatch.setattr(file_source, "RELOAD_PERIOD", 0.01)
    (tmp_path / "a.yaml").write_bytes(text(service("a")))
    followed = follow(tmp_path)
    assert followed.services() == ["a"]
    assert "cannot watch for changes (Too many open files)" in lines.next()
    renamed_into(tmp_path / "a.yaml", text(service("b")))
    assert followed.services() == ["b"]


# inotify


def test_inotify_tells_new_directories_from_watched_ones(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with Inotify() as notices:
        assert notices.read() == []
        assert notices.watch([str(folder), str(tmp_path / "missing")])
        assert not notices.watch([str(folder)])
        (folder / "ä").write_text("x")
        assert {(event.directory, event.name) for event in notices.read()} == {(str(folder), "ä")}
        assert notices.watch([str(tmp_path)])
        (folder / "b").write_text("x")  # not watched any more
        assert notices.read() == []
        notices.watch([str(folder)])
        (folder / "ä").unlink()
        (folder / "b").unlink()
        folder.rmdir()
        notices.read()
        folder.mkdir()
        assert notices.watch([str(folder)])
        descriptor = notices.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


class Reader:
    """A reader of `path` with its notices, to be asked step by step."""

    def __init__(self, path: Path, notices: Inotify) -> None:
        self.wake = os.eventfd(0)
        self.reader = SettledReader(str(path), notices, self.wake)
        self.found: queue.Queue[PathSnapshot] = queue.Queue()

    def read_after_wait(self) -> threading.Thread:
        def read() -> None:
            self.reader.wait()
            self.found.put(self.reader.read())

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


def test_a_reading_waits_for_the_end_of_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_TIMEOUT", HANG)
    waits = threading.Event()

    class Observed(SettledReader):
        def _wait_for_events(self, seconds: float | None) -> bool:
            waits.set()
            return super()._wait_for_events(seconds)

    path = tmp_path / "a.yaml"
    path.write_bytes(GOOD)
    found: queue.Queue[PathSnapshot] = queue.Queue()
    wake = os.eventfd(0)
    with Inotify() as notices:
        reader = Observed(str(tmp_path), notices, wake)
        with path.open("wb", buffering=0) as file:
            file.write(b"# half")
            thread = threading.Thread(target=lambda: found.put(reader.read()), daemon=True)
            thread.start()
            assert waits.wait(HANG)
            file.write(b" and half")
        assert found.get(timeout=HANG).files == {str(path): b"# half and half"}
        thread.join(HANG)
    os.close(wake)


def test_a_writer_that_never_ends_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_TIMEOUT", 0.05)
    path = tmp_path / "a.yaml"
    path.write_bytes(GOOD)
    with Inotify() as notices, path.open("ab", buffering=0) as file:
        reader = Reader(tmp_path, notices)
        assert reader.reader.read().files == {str(path): GOOD}
        thread = reader.read_after_wait()
        file.write(b"# more")
        assert reader.found.get(timeout=HANG).files == {str(path): GOOD + b"# more"}
        thread.join(HANG)
        os.close(reader.wake)


def test_only_what_counts_is_a_reason_to_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    (folder / "a.yaml").write_bytes(GOOD)
    with Inotify() as notices:
        places = find_watched_paths(str(folder))
        assert places.directories == (str(tmp_path), str(folder))
        notices.watch(places.directories)

        def reasons() -> list[str]:
            return [event.name for event in notices.read() if places.requires_read(event)]

        (tmp_path / "log").write_text("next to the folder")
        (tmp_path / "log").unlink()
        with (folder / "notes.txt").open("w") as notes:
            reasons()  # that it was made
            notes.write("no object file")
        (folder / ".hidden.yaml").write_text("")
        assert "notes.txt" not in reasons()
        folder.chmod(0o755)
        (folder / "a.yaml").chmod(0o600)
        assert set(reasons()) == {"objects", "a.yaml", ""}
        (folder / "a.yaml").rename(folder / "b.yaml")
        assert reasons() == ["a.yaml", "b.yaml"]
        folder.rename(tmp_path / "away")
        assert "objects" in reasons()


def test_places_of_a_path_that_is_not_there_or_is_a_link(tmp_path: Path) -> None:
    missing = find_watched_paths(str(tmp_path / "x" / "y" / "z"))
    assert (missing.directories, missing.awaited) == ((str(tmp_path),), "x")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(GOOD)
    (tmp_path / "link").symlink_to("real/file")
    link = find_watched_paths(str(tmp_path / "link"))
    assert link.directories == (str(tmp_path), str(tmp_path / "real"))
    assert link.awaited == ""
    assert link.files == {str(tmp_path / "link"), str(tmp_path / "real" / "file")}


def test_parts_that_are_of_no_use_are_warned_about_with_their_line() -> None:
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
        "a.yaml:8: EndpointSlice demo/web-1: ignoring unusable endpoints and ports: "
        'endpoints[1].addresses[0] must be an IPv4 address, not "fd00::1"',
    )
    assert loaded.problems == ()
