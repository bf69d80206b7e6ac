"""`kproxy run` apart from its rules: Events, HTTP pages, metrics, and the exit when its configuration changes."""

from __future__ import annotations

import http.client
import json
import re
import time
from pathlib import Path

import pytest

from tests.api.conftest import Cluster
from tests.api.node import NodeDaemon
from tests.api.test_events import first_events
from tests.apiserver.objects import endpoint_slice, node, service
from tests.lab.waiting import HANG_GUARD, wait_until

CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
conntrack: {maxPerCore: 0, min: 0}
"""


def get(daemon: NodeDaemon, port: int, path: str) -> tuple[int, str]:
    def request() -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_GUARD)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    return daemon.namespace.call(request)


def test_pages_on_the_health_and_metrics_ports(cluster: Cluster, daemon: NodeDaemon) -> None:
    cluster.create(node("node-1"))
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    daemon.start()
    daemon.settle()
    wait_until(lambda: get(daemon, 10256, "/healthz")[0] == 200, "status 200 of /healthz")
    assert get(daemon, 10256, "/livez")[0] == 200
    assert get(daemon, 10249, "/proxyMode") == (200, "iptables")
    assert '"hostnameOverride": "node-1"' in get(daemon, 10249, "/configz")[1].replace('":"', '": "')
    assert get(daemon, 10249, "/statusz")[0] == 200
    assert "\nhostname-override=node-1\n" in get(daemon, 10249, "/flagz")[1]
    page = get(daemon, 10249, "/metrics")[1]
    assert 'kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="nat"}' in page
    assert 'rest_client_requests_total{code="200"' in page
    contact = re.search(r'kproxy_api_last_contact_timestamp_seconds\{kind="Service"\} (\S+)', page)
    assert contact
    assert 0.0 <= time.time() - float(contact[1]) < HANG_GUARD
    for path in ("/healthz", "/livez"):
        assert "apiStaleSeconds" not in get(daemon, 10256, path)[1]


def test_absent_api_server_is_shown_and_the_node_keeps_serving(cluster: Cluster, daemon: NodeDaemon) -> None:
    cluster.create(node("node-1"))
    cluster.create(service("web", "10.96.7.1"))
    daemon.start()
    daemon.settle()
    wait_until(lambda: get(daemon, 10256, "/healthz")[0] == 200, "status 200 of /healthz")
    rules = daemon.rules()
    cluster.stop()
    failed = re.compile(r'kproxy_reflector_errors_total\{kind="Service",reason="connection"\} [1-9]')
    wait_until(lambda: failed.search(get(daemon, 10249, "/metrics")[1]), "an error of the watch")
    assert get(daemon, 10256, "/healthz")[0] == 200
    assert daemon.rules() == rules
    cluster.start()
    cluster.create(service("new", "10.96.7.2"))
    daemon.settle()


def test_node_about_to_be_deleted_is_not_eligible(cluster: Cluster, daemon: NodeDaemon) -> None:
    body = node("node-1")
    cluster.create(body)
    daemon.start()
    daemon.settle()
    wait_until(lambda: get(daemon, 10256, "/healthz")[0] == 200, "status 200 of /healthz")
    taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
    cluster.update(body | {"spec": {"taints": [taint]}})
    wait_until(lambda: get(daemon, 10256, "/healthz")[0] == 503, "status 503 of /healthz after the taint")
    assert get(daemon, 10256, "/livez")[0] == 200


def test_service_without_endpoints_is_logged_counted_and_written_as_event(
    cluster: Cluster, daemon: NodeDaemon, tmp_path: Path
) -> None:
    cluster.create(node("node-1"))
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    daemon.start()
    daemon.settle()
    cluster.update(endpoint_slice("web-x", "web", []))
    text = "IPv4: Service demo/web has no endpoints: new connections are rejected"
    wait_until(lambda: text in daemon.log(), "a log line about the missing endpoints")
    gauge = 'kproxy_services_without_endpoints{ip_family="IPv4"}'
    wait_until(lambda: f"{gauge} 1.0\n" in get(daemon, 10249, "/metrics")[1], "the gauge")
    (event,) = first_events(cluster, tmp_path, text, 1)
    assert (event["type"], event["reason"]) == ("Warning", "NoEndpoints")
    assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Service", "web")
    cluster.update(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    wait_until(
        lambda: "IPv4: Service demo/web has endpoints again" in daemon.log(), "a log line about the new endpoints"
    )
    wait_until(lambda: f"{gauge} 0.0\n" in get(daemon, 10249, "/metrics")[1], "the gauge")


MISSING = 'Node "node-1" not found: '
NAMING = "set --hostname-override (hostnameOverride)"


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_missing_node_is_reported_in_log_healthz_and_metrics(cluster: Cluster, daemon: NodeDaemon, mode: str) -> None:
    cluster.create(node("node-of-another-name"))
    daemon.start(f"--proxy-mode={mode}")
    wait_until(lambda: f"] {MISSING}" in daemon.log(), "a warning about the Node")
    wait_until(lambda: get(daemon, 10256, "/livez")[0] == 200, "the first sync")
    status, body = get(daemon, 10256, "/healthz")
    health = json.loads(body)
    assert (status, health["nodeEligible"]) == (503, False)
    assert health["reason"].startswith(MISSING)
    assert NAMING in health["reason"]
    assert f"] {health['reason']}\n" in daemon.log()
    assert "\nkproxy_node_missing 1.0\n" in get(daemon, 10249, "/metrics")[1]
    cluster.create(node("node-1"))
    wait_until(lambda: '] Node "node-1" exists\n' in daemon.log(), "a log line about the Node")
    wait_until(lambda: get(daemon, 10256, "/healthz")[0] == 200, "status 200 of /healthz")
    assert "reason" not in get(daemon, 10256, "/healthz")[1]
    assert "\nkproxy_node_missing 0.0\n" in get(daemon, 10249, "/metrics")[1]
    cluster.delete(node("node-1"))
    wait_until(lambda: '] Node "node-1" was deleted: ' in daemon.log(), "a warning about the Node")
    assert get(daemon, 10256, "/healthz")[0] == 503


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_missing_pod_cidrs_are_reported_with_detect_local_mode_node_cidr(
    cluster: Cluster, daemon: NodeDaemon, mode: str
) -> None:
    daemon.start(f"--proxy-mode={mode}", "--detect-local-mode=NodeCIDR")
    wait_until(lambda: f"] {MISSING}nothing is programmed" in daemon.log(), "a warning about the Node")
    assert MISSING in json.loads(get(daemon, 10256, "/healthz")[1])["reason"]
    body = node("node-1")
    body["spec"] = {}
    cluster.create(body)
    waiting = 'Node "node-1" has no podCIDRs (required by detectLocalMode NodeCIDR): nothing is programmed'
    wait_until(lambda: f"] {waiting}" in daemon.log(), "a warning about the pod CIDRs")
    assert waiting in json.loads(get(daemon, 10256, "/healthz")[1])["reason"]
    cluster.update(body | {"spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]}})
    wait_until(lambda: get(daemon, 10256, "/healthz")[0] == 200, "status 200 of /healthz")
    assert '] Node "node-1" exists and has podCIDRs\n' in daemon.log()


def test_changed_configuration_file_makes_it_exit(cluster: Cluster, daemon: NodeDaemon, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    process = daemon.start(f"--config={file}")
    daemon.settle()
    rules = daemon.rules()
    file.write_text(CONFIG + "oomScoreAdj: -998\n")
    assert process.wait(HANG_GUARD) == 1
    assert f"{file} has changed: exiting to restart with the new configuration" in daemon.log()
    assert daemon.rules() == rules


def test_invalid_edit_of_the_configuration_file_is_reported_and_ignored(
    cluster: Cluster, daemon: NodeDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    process = daemon.start(f"--config={file}", "--strict-config")
    daemon.settle()

    def edit(text: str, message: str) -> None:
        file.write_text(CONFIG + text)
        wait_until(lambda: message in daemon.log(), message)

    edit("iptables: {masqueradeBit: 32}\n", f"{file}:4: iptables.masqueradeBit: must be an integer from 0 to 31")
    edit("clusterCidr: 10.0.0.0/8\n", f"{file}:4: clusterCidr: unknown field; did you mean clusterCIDR? (edit ignored")
    edit(
        "# the flag --cluster-cidr wins\nclusterCIDR: 10.0.0.0/8\n",
        f"{file}: edited, but the configuration is unchanged",
    )
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    daemon.settle()
    assert process.poll() is None
    rules = daemon.rules()
    file.write_text(CONFIG + "iptables: {masqueradeBit: 3}\n")
    assert process.wait(HANG_GUARD) == 1
    assert daemon.log().endswith(f"kproxy: {file} has changed: exiting to restart with the new configuration\n")
    assert daemon.rules() == rules
