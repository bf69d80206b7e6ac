"""Alerts and dashboard use metrics and labels that the daemon serves, and every alert has a runbook."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kproxy.model.types import Family
from kproxy.serve.http import HttpRequest
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED, LocalhostNodePorts, MetricDefinitions
from kproxy.serve.metrics import Metrics
from tests.deploy.rendered import ROOT

ALERTS = ROOT / "deploy/monitoring/alerts.yaml"
DASHBOARD = ROOT / "deploy/monitoring/dashboard.json"
OPERATIONS = ROOT / "docs/operations.md"

EXTERNAL = {
    "up": set[str](),
    "kube_daemonset_status_desired_number_scheduled": {"namespace", "daemonset"},
    "kube_daemonset_status_number_ready": {"namespace", "daemonset"},
}
"""Series of Prometheus and kube-state-metrics, with their labels."""

PROMETHEUS_LABELS = {"job", "instance", "le"}

_METRIC = re.compile(r"\b(?:kubeproxy|kproxy|kubernetes|rest_client|process|go|kube)_[a-z0-9_]+\b|\bup\b(?=\{)")
_SELECTOR = re.compile(r"([a-z0-9_]+)\{([^}]*)\}")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def counters() -> dict[tuple[str, str], Any]:
    return {INVALID_DROPPED: lambda: 1, LOCALHOST_ACCEPTED: lambda: 1}


def served() -> set[str]:
    """Return the names of all metrics that the daemon serves in either mode, as Prometheus stores them."""
    names = set()
    for mode in ("iptables", "nftables"):
        metrics = Metrics(mode, tuple(Family), counters(), wall=lambda: 0.0)
        metrics.track_service_connections(dict)
        metrics.track_localhost_node_ports(lambda: {Family.IPV4: LocalhostNodePorts({"TCP": 1}, 1, 0)})
        page = metrics.page(HttpRequest("GET", "/metrics", {}, persistent=False)).body.decode()
        for family in text_string_to_metric_families(page):
            names |= {f"{family.name}_total"} if family.type == "counter" else {family.name}
    return names


def labels() -> dict[str, set[str]]:
    """Return the labels of each metric that has labels."""
    by_name = {}
    for mode in ("iptables", "nftables"):
        for metric in MetricDefinitions(mode, tuple(Family), counters()).recorded:
            by_name[metric.name] = set(metric.labels)
    return by_name


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return parsed


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def plain(name: str, known: set[str]) -> str:
    """Return a metric's name without the suffix of a histogram series."""
    return name if name in known else _SUFFIX.sub("", name)


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_metric_is_served(expression: str) -> None:
    known = served() | set(EXTERNAL)
    names = {plain(name, known) for name in _METRIC.findall(expression)}
    assert names
    assert names <= known


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_label_in_a_selector_exists(expression: str) -> None:
    known = labels() | EXTERNAL
    for name, selector in _SELECTOR.findall(expression):
        used = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector))
        assert used <= known.get(plain(name, set(known)), set()) | PROMETHEUS_LABELS, name


def test_metrics_in_the_documentation_are_served() -> None:
    section = OPERATIONS.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split(" | ")[0])}
    assert len(names) > 10
    assert names <= served()


def anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub generates for the headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alert_has_a_summary_description_and_runbook(rule: dict[str, Any]) -> None:
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    page, anchor = annotations["runbook_url"].split("#")
    assert page == "docs/operations.md"
    assert anchor == rule["alert"].lower()
    section = OPERATIONS.read_text().split(f"\n### {rule['alert']}\n")[1].split("\n### ")[0]
    assert len(section.split()) > 25


def test_documented_alerts_are_those_in_the_manifest() -> None:
    section = OPERATIONS.read_text().split("\n## Alerts\n")[1]
    assert re.findall(r"^### (\S+)$", section, re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_links_in_operations_md_have_targets() -> None:
    text = OPERATIONS.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        page, _, anchor = link.partition("#")
        target = OPERATIONS.parent / page if page else OPERATIONS
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_panels_have_unique_ids_and_positions() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()}) == len(panels())
    assert all(panel["title"] and panel["targets"] for panel in panels())
