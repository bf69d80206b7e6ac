"""Alerts and dashboard name metrics and labels that the daemon's page has, and say what to do."""

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
from kproxy.serve.metric_definitions import INVALID_DROPPED, LOCALHOST_ACCEPTED, MetricDefinitions
from kproxy.serve.metrics import Metrics
from tests.deploy.rendered import ROOT

ALERTS = ROOT / "deploy/monitoring/alerts.yaml"
DASHBOARD = ROOT / "deploy/monitoring/dashboard.json"
OPERATIONS = ROOT / "docs/operations.md"

OF_OTHERS = {
    "up": set[str](),
    "kube_daemonset_status_desired_number_scheduled": {"namespace", "daemonset"},
    "kube_daemonset_status_number_ready": {"namespace", "daemonset"},
}
"""Series of Prometheus itself and of kube-state-metrics, with their labels."""

LABELS_OF_PROMETHEUS = {"job", "instance", "le"}

_METRIC = re.compile(r"\b(?:kubeproxy|kproxy|kubernetes|rest_client|process|go|kube)_[a-z0-9_]+\b|\bup\b(?=\{)")
_SELECTOR = re.compile(r"([a-z0-9_]+)\{([^}]*)\}")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def counters() -> dict[tuple[str, str], Any]:
    return {INVALID_DROPPED: lambda: 1, LOCALHOST_ACCEPTED: lambda: 1}


def served() -> set[str]:
    """Return the names that stand on the pages of both modes, as Prometheus knows them."""
    names = set()
    for mode in ("iptables", "nftables"):
        metrics = Metrics(mode, tuple(Family), counters(), wall=lambda: 0.0)
        page = metrics.page(HttpRequest("GET", "/metrics", {}, persistent=False)).body.decode()
        for family in text_string_to_metric_families(page):
            names |= {f"{family.name}_total"} if family.type == "counter" else {family.name}
    return names


def labels() -> dict[str, set[str]]:
    """Return the labels of each metric that has any."""
    found = {}
    for mode in ("iptables", "nftables"):
        for item in vars(MetricDefinitions(mode, tuple(Family), counters())).values():
            for each in item.values() if isinstance(item, dict) else [item]:
                if hasattr(each, "_labelnames"):
                    name = f"{each._name}_total" if each._type == "counter" else each._name
                    found[name] = set(each._labelnames)
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def plain(name: str, known: set[str]) -> str:
    """Return a metric's name without the ending that a series of a histogram has."""
    return name if name in known else _SUFFIX.sub("", name)


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_metric_is_served(expression: str) -> None:
    known = served() | set(OF_OTHERS)
    names = {plain(name, known) for name in _METRIC.findall(expression)}
    assert names
    assert names <= known


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_label_that_is_selected_by_exists(expression: str) -> None:
    known = labels() | OF_OTHERS
    for name, selector in _SELECTOR.findall(expression):
        used = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector))
        assert used <= known.get(plain(name, set(known)), set()) | LABELS_OF_PROMETHEUS, name


def test_names_on_the_page_of_metrics_are_served() -> None:
    section = OPERATIONS.read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split(" | ")[0])}
    assert len(names) > 10
    assert names <= served()


def anchors(markdown: str) -> set[str]:
    """Return the anchors that headings have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_each_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    said = rule["annotations"]
    assert set(said) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    page, anchor = said["runbook_url"].split("#")
    assert page == "docs/operations.md"
    assert anchor == rule["alert"].lower()
    section = OPERATIONS.read_text().split(f"\n### {rule['alert']}\n")[1].split("\n### ")[0]
    assert len(section.split()) > 25


def test_no_section_is_about_an_alert_that_is_gone() -> None:
    section = OPERATIONS.read_text().split("\n## Alerts\n")[1]
    assert re.findall(r"^### (\S+)$", section, re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_links_of_the_page_lead_somewhere() -> None:
    text = OPERATIONS.read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        page, _, anchor = link.partition("#")
        target = OPERATIONS.parent / page if page else OPERATIONS
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_panels_have_numbers_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in panels()}) == len(panels())
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()}) == len(panels())
    assert all(panel["title"] and panel["targets"] for panel in panels())
