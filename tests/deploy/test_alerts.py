"""Conditions and summaries of the alerts, evaluated by Prometheus' `promtool test rules` on synthetic series."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deploy.test_monitoring import ALERTS, rules

STEPS = 60
"""Number of values of each series, at intervals of one minute."""


def always(value: int) -> str:
    return f"{value}x{STEPS}"


GROWING = f"0+1x{STEPS}"


def up(node: str, values: str, job: str = "kproxy") -> dict[str, str]:
    return {f'up{{job="{job}",instance="{node}"}}': values}


def daemon_set(name: str, desired: str, ready: str, *, source: str = "ksm-1") -> dict[str, str]:
    """Return the series of kube-state-metrics for a DaemonSet in kube-system."""
    labels = f'{{namespace="kube-system",daemonset="{name}",job="kube-state-metrics",instance="{source}"}}'
    scheduled, number_ready = "kube_daemonset_status_desired_number_scheduled", "kube_daemonset_status_number_ready"
    return {scheduled + labels: desired, number_ready + labels: ready}


def requests(code: str, values: str) -> dict[str, str]:
    labels = f'job="kproxy",instance="node-1",host="192.0.2.1:6443",method="GET",code="{code}"'
    return {f"rest_client_requests_total{{{labels}}}": values}


REPLACED = daemon_set("kube-proxy", always(0), always(0))
"""kube-proxy after kproxy has replaced it."""

HEALTHY = up("node-1", always(1)) | REPLACED | daemon_set("kproxy", always(3), always(3)) | requests("200", GROWING)


class Alert(NamedTuple):
    """A firing alert: its labels except `severity`, and its summary."""

    labels: dict[str, str]
    summary: str


def down(count: int, name: str) -> Alert:
    labels = {"namespace": "kube-system", "daemonset": name}
    return Alert(labels, f"{count} nodes have no ready Pod of DaemonSet {name}")


def not_scraped(node: str) -> Alert:
    return Alert({"instance": node, "job": "kproxy"}, f"{node}: Prometheus cannot scrape the service proxy")


ABSENT = Alert({}, "No DaemonSet runs a service proxy, or kube-state-metrics is not scraped")
NOTHING_SCRAPED = Alert({}, "all nodes: Prometheus cannot scrape the service proxy")


def api_error(code: str) -> Alert:
    labels = {"instance": "node-1", "host": "192.0.2.1:6443", "code": code}
    return Alert(labels, f"node-1: requests to API server 192.0.2.1:6443 fail with {code}")


CASES: dict[str, tuple[str, dict[str, str], list[Alert]]] = {
    "all Pods are ready": ("KproxyDown", HEALTHY, []),
    "one Pod is missing": ("KproxyDown", HEALTHY | daemon_set("kproxy", always(3), always(2)), [down(1, "kproxy")]),
    "all Pods are missing": ("KproxyDown", REPLACED | daemon_set("kproxy", always(3), always(0)), [down(3, "kproxy")]),
    "Pods of kube-proxy are missing": (
        "KproxyDown",
        daemon_set("kube-proxy", always(3), always(1)),
        [down(2, "kube-proxy")],
    ),
    "two replicas of kube-state-metrics": (
        "KproxyDown",
        daemon_set("kproxy", always(3), always(2)) | daemon_set("kproxy", always(3), always(2), source="ksm-2"),
        [down(1, "kproxy")],
    ),
    "an upgrade is in progress": ("KproxyDown", daemon_set("kproxy", always(3), "3x37 2x22"), []),
    "Pods of another DaemonSet are missing": ("KproxyDown", daemon_set("node-exporter", always(3), always(0)), []),
    "kproxy is installed": ("KproxyAbsent", HEALTHY, []),
    "kube-proxy is installed": ("KproxyAbsent", daemon_set("kube-proxy", always(3), always(3)), []),
    "no DaemonSet exists": ("KproxyAbsent", up("node-1", always(0)), [ABSENT]),
    "kube-proxy is disabled and kproxy is not installed": ("KproxyAbsent", REPLACED, [ABSENT]),
    "all nodes are scraped": ("KproxyNotScraped", HEALTHY, []),
    "one node is not scraped": (
        "KproxyNotScraped",
        HEALTHY | up("node-2", always(0)),
        [not_scraped("node-2")],
    ),
    "Prometheus has no target": (
        "KproxyNotScraped",
        REPLACED | up("node-1", always(1), job="apiserver"),
        [NOTHING_SCRAPED],
    ),
    "the Node exists": ("KproxyNodeMissing", {'kproxy_node_missing{job="kproxy",instance="node-1"}': always(0)}, []),
    "the Node does not exist": (
        "KproxyNodeMissing",
        {'kproxy_node_missing{job="kproxy",instance="node-1"}': always(1)},
        [Alert({"instance": "node-1", "job": "kproxy"}, "node-1: the Node object of the service proxy does not exist")],
    ),
    "requests succeed": ("KproxyApiErrors", HEALTHY, []),
    "requests are forbidden": ("KproxyApiErrors", HEALTHY | requests("403", GROWING), [api_error("403")]),
    "the API server is overloaded": ("KproxyApiErrors", HEALTHY | requests("503", GROWING), [api_error("503")]),
    "a path does not exist": ("KproxyApiErrors", HEALTHY | requests("404", GROWING), [api_error("404")]),
    "a watch has just expired": ("KproxyApiErrors", HEALTHY | requests("410", "0x42 1x17"), []),
}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool not found: install Debian's package prometheus")
    return found


def test_alert_rules_are_valid(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_alert_fires_only_in_the_expected_case(case: str, promtool: str, tmp_path: Path) -> None:
    name, series, expected = CASES[case]
    (rule,) = (rule for rule in rules() if rule["alert"] == name)
    alerts = [
        {"exp_labels": each.labels | rule["labels"], "exp_annotations": rule["annotations"] | {"summary": each.summary}}
        for each in expected
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "45m", "alertname": name, "exp_alerts": alerts}],
    }
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
