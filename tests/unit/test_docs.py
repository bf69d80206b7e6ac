"""The documentation is correct: links, files, make targets, flags, metrics, and the rules in examples."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

import kproxy
from kproxy.cli.main import main
from kproxy.cli.parser import COMMANDS
from kproxy.model.types import Family
from kproxy.serve.http import HttpRequest
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED, LocalhostNodePorts
from kproxy.serve.metrics import Metrics
from tests import module_table

ROOT = Path(__file__).parents[2]
PACKAGE = Path(kproxy.__file__).parent
DEVELOPER_PAGE = PACKAGE / "README.md"
E2E_OPTIONS = ROOT / "tests" / "e2e" / "conftest.py"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
OPTIONAL = (ROOT / "tests" / "e2e" / "README.md",)
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    DEVELOPER_PAGE,
    *(page for page in OPTIONAL if page.exists()),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

OTHER_PROGRAMS_FLAGS = {
    "--skip-phases": "kubeadm",
    "--services": "python -m tests.bench",
    "--beside": "python -m tests.bench",
    "--patience": "python -m tests.bench",
    "--summary": "python -m tests.bench",
    "--read": "python -m tests.bench",
    "--to-destination": "iptables",
}
"""Flags that pages name in prose and that belong to other programs, with the program."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_LINKED_TEST = re.compile(r"\[(test_\w+)\]\(([^)\s]+\.py)\)")
_TEST_NAME = re.compile(r"\btest_\w+\b(?!\.py)")
_TEST_DEFINITION = re.compile(r"^ *def (test_\w+)\(", re.MULTILINE)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_TARGET = re.compile(r"(?<![\w/.-])make (?:[A-Z]+=\S+ )*([a-z][a-z-]*)")
_METRIC = re.compile(r"\b(?:kubeproxy|kproxy|rest_client)_[a-z0-9_]+")
_FLAG = re.compile(r"(?<!\S)(--[a-z][a-z0-9-]*)")
_KPROXY = re.compile(r"(?:\$ )?(?:\S*/)?kproxy((?: [a-z]+)?)(?=\s|$)(.*)")
_FILE = re.compile(r"[\w./-]+\.(?:py|md|txt|svg|toml|yaml|json|sh)")


class Page(Struct, frozen=True):
    """The text of a page without code blocks, the lines of its code blocks, and its code spans."""

    prose: str
    blocks: tuple[str, ...]
    spans: tuple[str, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """All code: lines of blocks, and spans."""
        return self.blocks + self.spans


def read(path: Path) -> Page:
    text = path.read_text()
    prose = _FENCE.sub("", text)
    blocks = tuple(line for block in _FENCE.findall(text) for line in block.splitlines()[1:-1])
    return Page(prose, blocks, tuple(" ".join(span.split()) for span in _SPAN.findall(prose)))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page; repeated ones get a numeric suffix."""
    existing: list[str] = []
    for heading in _HEADING.findall(read(path).prose):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        earlier = sum(bool(re.fullmatch(re.escape(anchor) + r"(-\d+)?", item)) for item in existing)
        existing.append(f"{anchor}-{earlier}" if earlier else anchor)
    return set(existing)


def links(path: Path) -> list[tuple[Path, str]]:
    """Return the files of this repository that a page links to, with the anchors of the links."""
    targets = (link.partition("#") for link in _LINK.findall(read(path).prose) if "://" not in link)
    return [((path.parent / file).resolve() if file else path, anchor) for file, _, anchor in targets]


@EVERY_PAGE
def test_links_are_valid(page: Path) -> None:
    broken = [(str(file), anchor) for file, anchor in links(page) if not file.exists()]
    broken += [(str(file), anchor) for file, anchor in links(page) if anchor and anchor not in anchors(file)]
    assert broken == []


def test_links_are_found() -> None:
    assert {file.name for file, _ in links(ROOT / "README.md")} >= {"operations.md", "LICENSE"}
    assert (ROOT / "docs" / "operations.md", "image") in links(TROUBLESHOOTING)


@cache
def defined_tests(path: Path) -> frozenset[str]:
    """Return the names of the test functions in a file, or in all files of a folder."""
    files = path.rglob("test_*.py") if path.is_dir() else (path,)
    return frozenset(name for file in files for name in _TEST_DEFINITION.findall(file.read_text()))


@EVERY_PAGE
def test_named_tests_exist(page: Path) -> None:
    text = page.read_text()
    linked = [(name, (page.parent / file).resolve()) for name, file in _LINKED_TEST.findall(text)]
    missing = [(name, file.name) for name, file in linked if name not in defined_tests(file)]
    named = set(_TEST_NAME.findall(text)) - {name for name, _ in linked}
    missing += [(name, "tests") for name in sorted(named) if name not in defined_tests(ROOT / "tests")]
    assert missing == []


def test_named_tests_are_found() -> None:
    reliability, security = ((ROOT / "docs" / name).read_text() for name in ("reliability.md", "security.md"))
    assert len(_LINKED_TEST.findall(reliability)) > 100
    assert len(_TEST_NAME.findall(security)) > 30


@EVERY_PAGE
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name for line in read(page).code for name in _TARGET.findall(line)} - targets == set()


@cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags in the help of a command, or in the main help for ""."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as exited:
        main([*command.split(), "--help"])
    assert exited.value.code == 0, f"`kproxy {command}` does not exist"
    return frozenset(re.findall(r"--[a-z][a-z-]*", output.getvalue()))


def kproxy_calls(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the command and the arguments of every kproxy call on a page, without trailing comments."""
    for line in read(page).code:
        if call := _KPROXY.fullmatch(line.partition(" # ")[0].strip()):
            yield call[1].strip(), call[2]


@EVERY_PAGE
def test_flags_of_kproxy_calls_exist(page: Path) -> None:
    used = {(command, flag) for command, rest in kproxy_calls(page) for flag in _FLAG.findall(rest)}
    assert {(command, flag) for command, flag in used if flag not in flags_of(command)} == set()


@EVERY_PAGE
def test_flags_in_prose_exist(page: Path) -> None:
    matches = {_FLAG.match(span) for span in read(page).spans}
    flags = {match[1] for match in matches if match}
    ours = {flag for flag in flags if not flag.startswith("--e2e-")}
    assert ours - frozenset().union(*map(flags_of, COMMANDS)) - set(OTHER_PROGRAMS_FLAGS) == set()
    assert {flag for flag in flags - ours if f'"{flag}"' not in E2E_OPTIONS.read_text()} == set()


def test_flags_of_other_programs_are_mentioned_and_not_flags_of_kproxy() -> None:
    named = {span.partition("=")[0].partition(" ")[0] for page in PAGES for span in read(page).spans}
    assert set(OTHER_PROGRAMS_FLAGS) - named == set()
    assert set(OTHER_PROGRAMS_FLAGS) & flags_of("run") == set()


def test_kproxy_calls_are_found() -> None:
    assert ("run", " --cleanup") in kproxy_calls(ROOT / "docs" / "local.md")
    assert len(list(kproxy_calls(TROUBLESHOOTING))) > 1


@cache
def metrics() -> frozenset[str]:
    """Return the metric names on the `/metrics` pages of both modes."""
    names: set[str] = set()
    for mode in ("iptables", "nftables"):
        counters = {INVALID_DROPPED: lambda: 1, LOCALHOST_ACCEPTED: lambda: 1}
        served = Metrics(mode, tuple(Family), counters, wall=lambda: 0.0)
        served.track_service_connections(dict)
        served.track_localhost_node_ports(lambda: {Family.IPV4: LocalhostNodePorts({"TCP": 0}, 0, 0)})
        page = served.page(HttpRequest("GET", "/metrics", {}, persistent=False))
        for family in text_string_to_metric_families(page.body.decode()):
            endings = {"counter": ("_total",), "histogram": ("", "_bucket", "_sum", "_count")}
            names |= {family.name + ending for ending in endings.get(family.type, ("",))}
    return frozenset(names)


@EVERY_PAGE
def test_metrics_exist(page: Path) -> None:
    named = {name for name in _METRIC.findall(page.read_text()) if not name.endswith("_")}
    assert named - metrics() == set()


def test_module_table_matches_the_docstrings() -> None:
    assert module_table.updated(DEVELOPER_PAGE.read_text()) == DEVELOPER_PAGE.read_text(), (
        "run: python -m tests.module_table"
    )


def test_developer_page_has_a_section_for_every_package() -> None:
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*/__init__.py")} | {"kproxy/"}
    assert {
        heading.strip("`") for heading in _HEADING.findall(DEVELOPER_PAGE.read_text()) if heading.startswith("`")
    } == packages


def test_files_named_on_the_developer_page_exist() -> None:
    named = {span for span in read(DEVELOPER_PAGE).spans if _FILE.fullmatch(span)}
    missing = {name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()}
    assert missing == set()
    assert len(named) > 100


SERVICE: dict[str, Any] = {
    "type": "NodePort",
    "clusterIP": "10.96.0.80",
    "clusterIPs": ["10.96.0.80"],
    "ipFamilies": ["IPv4"],
    "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080, "protocol": "TCP"}],
}
LOCAL, REMOTE = ("10.244.1.7", "node-1"), ("10.244.2.9", "node-2")
EXAMPLES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "default": ({}, [LOCAL, REMOTE]),
    "no endpoints": ({}, []),
    "external Local": ({"externalTrafficPolicy": "Local"}, [REMOTE]),
    "internal Local": ({"internalTrafficPolicy": "Local"}, [REMOTE]),
    "affinity": ({"sessionAffinity": "ClientIP"}, [LOCAL, REMOTE]),
    "ranges": ({"type": "LoadBalancer", "loadBalancerSourceRanges": ["203.0.113.0/24"]}, [LOCAL, REMOTE]),
}
"""The examples of docs/troubleshooting.md: fields of the Service in addition to SERVICE, and its endpoints."""


def example(spec: dict[str, Any], endpoints: list[tuple[str, str]]) -> list[dict[str, Any]]:
    name = {"name": "web", "namespace": "shop"}
    status = {"loadBalancer": {"ingress": [{"ip": "198.51.100.80"}]}} if "loadBalancerSourceRanges" in spec else {}
    labeled = name | {"labels": {"kubernetes.io/service-name": "web"}}
    addresses = [{"type": "InternalIP", "address": "192.0.2.11"}]
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": SERVICE | spec, "status": status},
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}, "status": {"addresses": addresses}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": labeled,
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "nodeName": node} for address, node in endpoints],
        },
    ]


def rendered(directory: Path, mode: str) -> str:
    """Return the output of `kproxy render` for all examples."""
    output = io.StringIO()
    for number, (spec, endpoints) in enumerate(EXAMPLES.values()):
        file = directory / f"{number}.json"
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": example(spec, endpoints)}))
        flags = [f"--proxy-mode={mode}", "--hostname-override=node-1", "--cluster-cidr=10.244.0.0/16"]
        with contextlib.redirect_stdout(output):
            assert main(["render", f"--objects={file}", "--family=ipv4", *flags]) == 0
    return output.getvalue()


def test_documented_iptables_rules_match_kproxy(tmp_path: Path) -> None:
    rules = rendered(tmp_path, "iptables").splitlines()
    documented = [line for line in read(TROUBLESHOOTING).blocks if line.startswith("-A KUBE-")]
    patterns = {line: ".*".join(re.escape(part) for part in line.split("...")) for line in documented}
    assert [line for line, pattern in patterns.items() if not any(re.fullmatch(pattern, item) for item in rules)] == []
    assert len(documented) > 10


def test_documented_nftables_elements_match_kproxy(tmp_path: Path) -> None:
    table = rendered(tmp_path, "nftables")
    lines = [line for line in read(TROUBLESHOOTING).blocks if re.match(r"\s+(elements = \{|\d\S*[.:]\S)", line)]
    documented = [line.replace("elements = {", "").strip(" \t{},") for line in lines]
    assert [element for element in documented if element not in table] == []
    assert len(documented) > 4
