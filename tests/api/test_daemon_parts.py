"""What `kproxy run` does beside rules: events, pages, request counts, and ending when its configuration changes."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

from tests.api.conftest import Cluster
from tests.api.node import ProxiedNode
from tests.api.test_events import first_events
from tests.apiserver.objects import endpoint_slice, node, service
from tests.lab.waiting import HANG_GUARD, wait_until

CONFIG = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
conntrack: {maxPerCore: 0, min: 0}
"""


def get(proxied: ProxiedNode, port: int, path: str) -> tuple[int, str]:
    def ask() -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_GUARD)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    return proxied.namespace.call(ask)


def test_pages_on_their_ports(cluster: Cluster, proxied: ProxiedNode) -> None:
    cluster.create(node("node-1"))
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    proxied.start()
    proxied.settle()
    wait_until(lambda: get(proxied, 10256, "/healthz")[0] == 200, "a healthy answer")
    assert get(proxied, 10256, "/livez")[0] == 200
    assert get(proxied, 10249, "/proxyMode") == (200, "iptables")
    assert '"hostnameOverride": "node-1"' in get(proxied, 10249, "/configz")[1].replace('":"', '": "')
    assert get(proxied, 10249, "/statusz")[0] == 200
    assert "\nhostname-override=node-1\n" in get(proxied, 10249, "/flagz")[1]
    page = get(proxied, 10249, "/metrics")[1]
    assert 'kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="nat"}' in page
    assert 'rest_client_requests_total{code="200"' in page


def test_a_node_that_is_about_to_go_is_not_eligible(cluster: Cluster, proxied: ProxiedNode) -> None:
    body = node("node-1")
    cluster.create(body)
    proxied.start()
    proxied.settle()
    wait_until(lambda: get(proxied, 10256, "/healthz")[0] == 200, "a healthy answer")
    taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
    cluster.update(body | {"spec": {"taints": [taint]}})
    wait_until(lambda: get(proxied, 10256, "/healthz")[0] == 503, "the Node's taint to be seen")
    assert get(proxied, 10256, "/livez")[0] == 200


def test_a_service_without_endpoints_is_logged_counted_and_an_event(
    cluster: Cluster, proxied: ProxiedNode, tmp_path: Path
) -> None:
    cluster.create(node("node-1"))
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    proxied.start()
    proxied.settle()
    cluster.update(endpoint_slice("web-x", "web", []))
    text = "IPv4: Service demo/web has no endpoints: new connections are rejected"
    wait_until(lambda: text in proxied.log(), "a line about it")
    gauge = 'kproxy_services_without_endpoints{ip_family="IPv4"}'
    wait_until(lambda: f"{gauge} 1.0\n" in get(proxied, 10249, "/metrics")[1], "the gauge")
    (event,) = first_events(cluster, tmp_path, text, 1)
    assert (event["type"], event["reason"]) == ("Warning", "NoEndpoints")
    assert (event["regarding"]["kind"], event["regarding"]["name"]) == ("Service", "web")
    cluster.update(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    wait_until(lambda: "IPv4: Service demo/web has endpoints again" in proxied.log(), "a line about its end")
    wait_until(lambda: f"{gauge} 0.0\n" in get(proxied, 10249, "/metrics")[1], "the gauge")


MISSING = 'Node "node-1" not found: '
NAMING = "set --hostname-override (hostnameOverride)"


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_a_node_that_does_not_exist_is_said_wherever_people_look(
    cluster: Cluster, proxied: ProxiedNode, mode: str
) -> None:
    cluster.create(node("node-of-another-name"))
    proxied.start(f"--proxy-mode={mode}")
    wait_until(lambda: f"] {MISSING}" in proxied.log(), "a warning about the Node")
    wait_until(lambda: get(proxied, 10256, "/livez")[0] == 200, "the first sync")
    status, body = get(proxied, 10256, "/healthz")
    answer = json.loads(body)
    assert (status, answer["nodeEligible"]) == (503, False)
    assert answer["reason"].startswith(MISSING)
    assert NAMING in answer["reason"]
    assert f"] {answer['reason']}\n" in proxied.log()
    assert "\nkproxy_node_missing 1.0\n" in get(proxied, 10249, "/metrics")[1]
    cluster.create(node("node-1"))
    wait_until(lambda: '] Node "node-1" exists\n' in proxied.log(), "a line about the Node")
    wait_until(lambda: get(proxied, 10256, "/healthz")[0] == 200, "a healthy answer")
    assert "reason" not in get(proxied, 10256, "/healthz")[1]
    assert "\nkproxy_node_missing 0.0\n" in get(proxied, 10249, "/metrics")[1]
    cluster.delete(node("node-1"))
    wait_until(lambda: '] Node "node-1" was deleted: ' in proxied.log(), "a warning about the Node")
    assert get(proxied, 10256, "/healthz")[0] == 503


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_what_detection_by_the_nodes_cidrs_waits_for_is_said(cluster: Cluster, proxied: ProxiedNode, mode: str) -> None:
    proxied.start(f"--proxy-mode={mode}", "--detect-local-mode=NodeCIDR")
    wait_until(lambda: f"] {MISSING}nothing is programmed" in proxied.log(), "a warning about the Node")
    assert MISSING in json.loads(get(proxied, 10256, "/healthz")[1])["reason"]
    body = node("node-1")
    body["spec"] = {}
    cluster.create(body)
    waiting = 'Node "node-1" has no podCIDRs, which detectLocalMode: NodeCIDR needs: nothing is programmed'
    wait_until(lambda: f"] {waiting}" in proxied.log(), "a warning about the pod CIDRs")
    assert waiting in json.loads(get(proxied, 10256, "/healthz")[1])["reason"]
    cluster.update(body | {"spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24"]}})
    wait_until(lambda: get(proxied, 10256, "/healthz")[0] == 200, "a healthy answer")
    assert '] Node "node-1" exists and has podCIDRs\n' in proxied.log()


def test_a_changed_configuration_file_ends_it(cluster: Cluster, proxied: ProxiedNode, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    process = proxied.start(f"--config={file}")
    proxied.settle()
    held = proxied.rules()
    file.write_text(CONFIG + "oomScoreAdj: -998\n")
    assert process.wait(HANG_GUARD) == 1
    assert f"{file} has changed: ending, to be started again with it" in proxied.log()
    assert proxied.rules() == held


def test_an_edit_of_the_configuration_file_that_is_not_valid_is_reported_and_the_old_one_stays(
    cluster: Cluster, proxied: ProxiedNode, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    process = proxied.start(f"--config={file}", "--strict-config")
    proxied.settle()

    def edit(text: str, said: str) -> None:
        file.write_text(CONFIG + text)
        wait_until(lambda: said in proxied.log(), said)

    edit("iptables: {masqueradeBit: 32}\n", f"{file}:4: iptables.masqueradeBit: must be an integer from 0 to 31")
    edit("clusterCidr: 10.0.0.0/8\n", f"{file}:4: clusterCidr: unknown field; did you mean clusterCIDR? (edit ignored")
    edit(
        "# the flag --cluster-cidr wins\nclusterCIDR: 10.0.0.0/8\n",
        f"{file}: edited, but the configuration is unchanged",
    )
    cluster.create(service("web", "10.96.7.1"))
    cluster.create(endpoint_slice("web-x", "web", ["10.244.1.1"]))
    proxied.settle()
    assert process.poll() is None
    held = proxied.rules()
    file.write_text(CONFIG + "iptables: {masqueradeBit: 3}\n")
    assert process.wait(HANG_GUARD) == 1
    assert proxied.log().endswith(f"kproxy: {file} has changed: ending, to be started again with it\n")
    assert proxied.rules() == held
