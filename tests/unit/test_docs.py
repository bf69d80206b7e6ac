"""The pages say what is there: links, files, targets of make, flags, metrics, and the rules that they show."""

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
from kproxy.model.types import Family
from kproxy.serve.http import HttpRequest
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED
from kproxy.serve.metrics import Metrics
from tests import module_table

ROOT = Path(__file__).parents[2]
PACKAGE = Path(kproxy.__file__).parent
MAP = PACKAGE / "README.md"
E2E_OPTIONS = ROOT / "tests" / "e2e" / "conftest.py"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
OPTIONAL = (ROOT / "tests" / "e2e" / "README.md",)
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    MAP,
    *(page for page in OPTIONAL if page.exists()),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

OF_OTHERS = {
    "--skip-phases": "kubeadm",
    "--services": "python -m tests.bench",
    "--read": "python -m tests.bench",
    "--to-destination": "iptables",
}
"""Flags that pages name on their own, and the program that each is of; all others are kproxy's."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_TARGET = re.compile(r"(?<![\w/.-])make (?:[A-Z]+=\S+ )*([a-z][a-z-]*)")
_METRIC = re.compile(r"\b(?:kubeproxy|kproxy|rest_client)_[a-z0-9_]+")
_FLAG = re.compile(r"(?<!\S)(--[a-z][a-z0-9-]*)")
_KPROXY = re.compile(r"(?:\$ )?(?:\S*/)?kproxy((?: [a-z]+)?)(?=\s|$)(.*)")
_FILE = re.compile(r"[\w./-]+\.(?:py|md|txt|svg|toml|yaml|json|sh)")


class Page(Struct, frozen=True):
    """A page's prose, without the code that stands in blocks, and its code: lines of blocks, and spans."""

    prose: str
    blocks: tuple[str, ...]
    spans: tuple[str, ...]

    @property
    def code(self) -> tuple[str, ...]:
        """All that is set as code."""
        return self.blocks + self.spans


def read(path: Path) -> Page:
    text = path.read_text()
    prose = _FENCE.sub("", text)
    blocks = tuple(line for block in _FENCE.findall(text) for line in block.splitlines()[1:-1])
    return Page(prose, blocks, tuple(" ".join(span.split()) for span in _SPAN.findall(prose)))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings; one that comes again has a number behind it."""
    found: list[str] = []
    for heading in _HEADING.findall(read(path).prose):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        earlier = sum(bool(re.fullmatch(re.escape(anchor) + r"(-\d+)?", each)) for each in found)
        found.append(f"{anchor}-{earlier}" if earlier else anchor)
    return set(found)


def links(path: Path) -> list[tuple[Path, str]]:
    """The files of this repository that a page leads to, with their anchors."""
    targets = (link.partition("#") for link in _LINK.findall(read(path).prose) if "://" not in link)
    return [((path.parent / file).resolve() if file else path, anchor) for file, _, anchor in targets]


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    lost = [(str(file), anchor) for file, anchor in links(page) if not file.exists()]
    lost += [(str(file), anchor) for file, anchor in links(page) if anchor and anchor not in anchors(file)]
    assert lost == []


def test_links_are_found() -> None:
    assert {file.name for file, _ in links(ROOT / "README.md")} >= {"operations.md", "LICENSE"}
    assert (ROOT / "docs" / "operations.md", "image") in links(TROUBLESHOOTING)


@EVERY_PAGE
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name for line in read(page).code for name in _TARGET.findall(line)} - targets == set()


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags that the help of a command names; of kproxy itself for ""."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0, f"there is no `kproxy {command}`"
    return frozenset(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))


def kproxy_calls(page: Path) -> Iterator[tuple[str, str]]:
    """Every call of kproxy that a page shows: the command and the rest of the line, without its comment."""
    for line in read(page).code:
        if call := _KPROXY.fullmatch(line.partition(" # ")[0].strip()):
            yield call[1].strip(), call[2]


@EVERY_PAGE
def test_flags_in_calls_exist(page: Path) -> None:
    wrong = {(command, flag) for command, rest in kproxy_calls(page) for flag in _FLAG.findall(rest)}
    assert {(command, flag) for command, flag in wrong if flag not in flags_of(command)} == set()


@EVERY_PAGE
def test_flags_on_their_own_exist(page: Path) -> None:
    named = {_FLAG.match(span) for span in read(page).spans}
    flags = {found[1] for found in named if found}
    ours = {flag for flag in flags if not flag.startswith("--e2e-")}
    assert ours - flags_of("run") - set(OF_OTHERS) == set()
    assert {flag for flag in flags - ours if f'"{flag}"' not in E2E_OPTIONS.read_text()} == set()


def test_the_list_of_others_flags_is_short() -> None:
    named = {span.partition("=")[0].partition(" ")[0] for page in PAGES for span in read(page).spans}
    assert set(OF_OTHERS) - named == set()
    assert set(OF_OTHERS) & flags_of("run") == set()


def test_calls_are_found() -> None:
    assert ("run", " --cleanup") in kproxy_calls(ROOT / "docs" / "local.md")
    assert len(list(kproxy_calls(TROUBLESHOOTING))) > 1


@cache
def metrics() -> frozenset[str]:
    """The names that stand on the metrics pages of both modes."""
    names: set[str] = set()
    for mode in ("iptables", "nftables"):
        counters = {INVALID_DROPPED: lambda: 1, LOCALHOST_ACCEPTED: lambda: 1}
        page = Metrics(mode, tuple(Family), counters, wall=lambda: 0.0).page(
            HttpRequest("GET", "/metrics", {}, persistent=False)
        )
        for family in text_string_to_metric_families(page.body.decode()):
            endings = {"counter": ("_total",), "histogram": ("", "_bucket", "_sum", "_count")}
            names |= {family.name + ending for ending in endings.get(family.type, ("",))}
    return frozenset(names)


@EVERY_PAGE
def test_metrics_exist(page: Path) -> None:
    named = {name for name in _METRIC.findall(page.read_text()) if not name.endswith("_")}
    assert named - metrics() == set()


def test_the_table_of_modules_is_made_from_their_docstrings() -> None:
    assert module_table.updated(MAP.read_text()) == MAP.read_text(), "run: python -m tests.module_table"


def test_the_map_names_every_package() -> None:
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("*/__init__.py")} | {"kproxy/"}
    assert {heading.strip("`") for heading in _HEADING.findall(MAP.read_text()) if heading.startswith("`")} == packages


def test_files_that_the_map_names_exist() -> None:
    named = {span for span in read(MAP).spans if _FILE.fullmatch(span)}
    lost = {name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()}
    assert lost == set()
    assert len(named) > 100


SERVICE: dict[str, Any] = {
    "type": "NodePort",
    "clusterIP": "10.96.0.80",
    "clusterIPs": ["10.96.0.80"],
    "ipFamilies": ["IPv4"],
    "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080, "protocol": "TCP"}],
}
HERE, AWAY = ("10.244.1.7", "node-1"), ("10.244.2.9", "node-2")
EXAMPLES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "as it should be": ({}, [HERE, AWAY]),
    "no endpoints": ({}, []),
    "external Local": ({"externalTrafficPolicy": "Local"}, [AWAY]),
    "internal Local": ({"internalTrafficPolicy": "Local"}, [AWAY]),
    "affinity": ({"sessionAffinity": "ClientIP"}, [HERE, AWAY]),
    "ranges": ({"type": "LoadBalancer", "loadBalancerSourceRanges": ["203.0.113.0/24"]}, [HERE, AWAY]),
}
"""What the Service of docs/troubleshooting.md has beside SERVICE in its examples, and its endpoints."""


def example(spec: dict[str, Any], endpoints: list[tuple[str, str]]) -> list[dict[str, Any]]:
    name = {"name": "web", "namespace": "shop"}
    status = {"loadBalancer": {"ingress": [{"ip": "198.51.100.80"}]}} if "loadBalancerSourceRanges" in spec else {}
    joined = name | {"labels": {"kubernetes.io/service-name": "web"}}
    addresses = [{"type": "InternalIP", "address": "192.0.2.11"}]
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": SERVICE | spec, "status": status},
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}, "status": {"addresses": addresses}},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": joined,
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "nodeName": node} for address, node in endpoints],
        },
    ]


def rendered(folder: Path, mode: str) -> str:
    """What `kproxy render` prints for all the examples."""
    shown = io.StringIO()
    for number, (spec, endpoints) in enumerate(EXAMPLES.values()):
        file = folder / f"{number}.json"
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": example(spec, endpoints)}))
        flags = [f"--proxy-mode={mode}", "--hostname-override=node-1", "--cluster-cidr=10.244.0.0/16"]
        with contextlib.redirect_stdout(shown):
            assert main(["render", f"--objects={file}", "--family=ipv4", *flags]) == 0
    return shown.getvalue()


def test_rules_that_are_shown_are_those_of_kproxy(tmp_path: Path) -> None:
    rules = rendered(tmp_path, "iptables").splitlines()
    shown = [line for line in read(TROUBLESHOOTING).blocks if line.startswith("-A KUBE-")]
    patterns = {line: ".*".join(re.escape(part) for part in line.split("...")) for line in shown}
    assert [line for line, pattern in patterns.items() if not any(re.fullmatch(pattern, each) for each in rules)] == []
    assert len(shown) > 10


def test_elements_that_are_shown_are_those_of_kproxy(tmp_path: Path) -> None:
    table = rendered(tmp_path, "nftables")
    lines = [line for line in read(TROUBLESHOOTING).blocks if re.match(r"\s+(elements = \{|\d)", line)]
    shown = [line.replace("elements = {", "").strip(" \t{},") for line in lines]
    assert [element for element in shown if element not in table] == []
    assert len(shown) > 4
