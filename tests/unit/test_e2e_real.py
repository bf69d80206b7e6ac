"""Parts of the end-to-end tests that need no cluster: manifests, object status, and changes of the proxies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.e2e import manifests
from tests.e2e.cluster import Node, Object, Pod
from tests.e2e.real import objects
from tests.e2e.real.agents import Agents
from tests.e2e.real.api import Api, object_path
from tests.e2e.real.daemonset import rolled_out, selector_text, with_mode
from tests.e2e.real.proxies import REPLACED_LABEL, RealProxies

NODE = Node("worker", {"IPv4": "192.0.2.1"})


@pytest.mark.parametrize(
    "manifest",
    [
        objects.namespace("kproxy-e2e-1"),
        objects.serving_pod("web-0", "worker", "image", {"app": "web"}),
        objects.client_pod("client", "worker", "image", host_network=True),
        objects.agent_pod("agent-0", "worker", "image"),
        objects.dual_stack_trial(),
        manifests.service("web", "IPv6", "UDP", type="NodePort", externalTrafficPolicy="Local"),
        manifests.endpoint_slice(
            "web", "IPv4", [manifests.endpoint("192.0.2.9", "worker", hints={"forNodes": [{"name": "worker"}]})]
        ),
    ],
    ids=lambda manifest: str(manifest["kind"]),
)
def test_manifests_are_valid(manifest: Object) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    schemas.validate(manifest, "1.36", strict=True)


def node(name: str, *, ready: str = "True", **spec: Any) -> Object:
    addresses = [
        {"type": "InternalIP", "address": "192.0.2.1"},
        {"type": "InternalIP", "address": "2001:db8::1"},
        {"type": "Hostname", "address": name},
    ]
    status = {"conditions": [{"type": "Ready", "status": ready}], "addresses": addresses}
    return {"metadata": {"name": name, "labels": {objects.ZONE: "a"}}, "spec": spec, "status": status}


RESERVED: dict[str, Any] = {"taints": [{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}]}


def test_only_ready_and_schedulable_nodes_are_usable() -> None:
    nodes = [
        node("b"),
        node("a"),
        node("control-plane", **RESERVED),
        node("cordoned", unschedulable=True),
        node("lost", ready="Unknown"),
    ]
    assert [usable.name for usable in objects.usable_nodes(nodes)] == ["a", "b"]
    assert objects.usable_nodes(nodes)[0] == Node("a", {"IPv4": "192.0.2.1", "IPv6": "2001:db8::1"}, "a")


def test_control_plane_is_usable_if_it_is_the_only_ready_node() -> None:
    nodes = [node("control-plane", **RESERVED), node("lost", ready="False")]
    assert [usable.name for usable in objects.usable_nodes(nodes)] == ["control-plane"]


def test_terminating_pod_is_not_ready() -> None:
    pod = objects.client_pod("client", "worker", "image", host_network=False)
    pod["status"] = {"conditions": [{"type": "Ready", "status": "True"}], "podIPs": [{"ip": "10.244.0.9"}]}
    assert objects.is_ready(pod)
    assert objects.pod_of(pod) == Pod("client", "worker", {"IPv4": "10.244.0.9"})
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert not objects.is_ready(pod)


@pytest.mark.parametrize(
    ("change", "done"),
    [
        ({}, True),
        ({"observedGeneration": 1}, False),
        ({"updatedNumberScheduled": 2}, False),
        ({"numberAvailable": 2}, False),
        ({"numberUnavailable": 1}, False),
    ],
)
def test_rollout_is_complete_when_all_pods_are_updated_and_available(change: dict[str, int], done: bool) -> None:
    status = {
        "observedGeneration": 2,
        "desiredNumberScheduled": 3,
        "updatedNumberScheduled": 3,
        "numberAvailable": 3,
    }
    assert rolled_out({"metadata": {"generation": 2}, "status": status | change}) is done


def test_mode_change_keeps_other_settings() -> None:
    files = {"config.conf": "mode: iptables\nclusterCIDR: 10.244.0.0/16\n", "kubeconfig.conf": "text"}
    changed = with_mode(files, "nftables")
    assert yaml.safe_load(changed["config.conf"]) == {"mode": "nftables", "clusterCIDR": "10.244.0.0/16"}
    assert changed["kubeconfig.conf"] == "text"
    assert selector_text({"b": "2", "a": "1"}) == "a=1,b=2"


class FakeApi(Api):
    """An API server with two DaemonSets on one node. Every change is rolled out at once."""

    def __init__(self) -> None:
        self.sets = {name: self._daemonset(name) for name in ("kproxy", "kube-proxy")}
        self.sets["kube-proxy"]["spec"]["template"]["spec"]["nodeSelector"] = {REPLACED_LABEL: "true"}
        self.config_maps = {name: {"config.conf": "mode: iptables\n"} for name in ("kproxy-abc", "kube-proxy")}
        self.running: list[set[str]] = [self._running()]

    def _daemonset(self, name: str) -> Object:
        volume = {"name": "config", "configMap": {"name": f"{name}-abc" if name == "kproxy" else name}}
        spec = {"nodeSelector": {"kubernetes.io/os": "linux"}, "volumes": [volume]}
        matching = {"matchLabels": {"app": name}}
        return {"metadata": {"generation": 1}, "spec": {"selector": matching, "template": {"spec": spec}}}

    def _running(self) -> set[str]:
        return {
            name
            for name, item in self.sets.items()
            if REPLACED_LABEL not in item["spec"]["template"]["spec"]["nodeSelector"]
        }

    def find(self, path: str) -> Object | None:
        return self.sets.get(path.rpartition("/")[2])

    def get(self, path: str) -> Object:
        name = path.rpartition("/")[2]
        if path == object_path("ConfigMap", "kube-system", name):
            return {"data": self.config_maps[name]}
        counts = ("desiredNumberScheduled", "updatedNumberScheduled", "numberAvailable")
        return copy.deepcopy(self.sets[name]) | {"status": dict.fromkeys(counts, 1) | {"observedGeneration": 1}}

    def items(self, path: str, **selectors: str) -> list[Object]:
        return [{}] if selectors["labelSelector"].removeprefix("app=") in self._running() else []

    def merge(self, path: str, patch: Object) -> Object:
        selector = self.sets[path.rpartition("/")[2]]["spec"]["template"]["spec"]["nodeSelector"]
        for key, value in patch["spec"]["template"]["spec"]["nodeSelector"].items():
            if value is None:
                selector.pop(key, None)
            else:
                selector[key] = value
        self.running.append(self._running())
        return {}

    def strategic(self, path: str, patch: Object) -> Object:
        self.sets[path.rpartition("/")[2]]["spec"]["template"]["spec"] |= patch["spec"]["template"]["spec"]
        return {}

    def apply(self, path: str, body: Object) -> Object:
        self.config_maps[path.rpartition("/")[2]] = body["data"]
        return body

    def delete(self, path: str, grace: int | None = None) -> None:
        del self.config_maps[path.rpartition("/")[2]]

    def mode(self) -> str:
        """Return the proxy mode in the ConfigMap that kproxy's pods mount."""
        (volume,) = self.sets["kproxy"]["spec"]["template"]["spec"]["volumes"]
        files = self.config_maps[volume["configMap"]["name"]]
        return str(yaml.safe_load(files["config.conf"])["mode"])


class FakeAgents(Agents):
    """Agents that return the proxy mode of the node's kproxy."""

    def __init__(self, api: FakeApi) -> None:
        self._fake_api = api

    def get(self, node: str, url: str) -> tuple[int, str]:
        assert (node, url) == (NODE.name, "http://127.0.0.1:10249/proxyMode")
        return 200, self._fake_api.mode()


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def proxies(api: FakeApi) -> Iterator[RealProxies]:
    before = copy.deepcopy((api.sets, api.config_maps))
    yield RealProxies(api, FakeAgents(api), "kproxy", [NODE])
    assert (api.sets, api.config_maps) == before, "DaemonSets and ConfigMaps have not been restored"


def test_mode_lasts_until_the_end_of_its_block(api: FakeApi, proxies: RealProxies) -> None:
    with proxies.in_mode("nftables"):
        assert proxies.mode() == "nftables"
        assert api.config_maps["kproxy-abc"] == {"config.conf": "mode: iptables\n"}
    assert proxies.mode() == "iptables"


def test_mode_is_restored_after_a_failure(proxies: RealProxies) -> None:
    with pytest.raises(ZeroDivisionError), proxies.in_mode("nftables"):
        raise ZeroDivisionError


def test_current_mode_changes_nothing(api: FakeApi, proxies: RealProxies) -> None:
    with proxies.in_mode("iptables"):
        assert set(api.config_maps) == {"kproxy-abc", "kube-proxy"}


def test_kube_proxy_and_kproxy_never_run_at_once(api: FakeApi, proxies: RealProxies) -> None:
    assert proxies.lacks_kube_proxy() == ""
    with proxies.replaced_by_kube_proxy():
        assert api.running[-1] == {"kube-proxy"}
    assert api.running == [{"kproxy"}, set(), {"kube-proxy"}, set(), {"kproxy"}]


def test_proxies_are_swapped_back_after_a_failure(proxies: RealProxies) -> None:
    with pytest.raises(ZeroDivisionError), proxies.replaced_by_kube_proxy():
        raise ZeroDivisionError


def test_reasons_why_the_proxies_cannot_be_swapped(api: FakeApi) -> None:
    proxies = RealProxies(api, FakeAgents(api), "kproxy", [NODE])
    for mode in ("ipvs", '""'):
        api.config_maps["kube-proxy"] = {"config.conf": f"mode: {mode}\n"}
        assert "set iptables or nftables" in proxies.lacks_kube_proxy()
    del api.sets["kube-proxy"]["spec"]["template"]["spec"]["nodeSelector"][REPLACED_LABEL]
    assert "is not disabled" in proxies.lacks_kube_proxy()
    del api.sets["kube-proxy"]
    assert "has no DaemonSet kube-system/kube-proxy" in proxies.lacks_kube_proxy()
    assert proxies.missing() == ""
    assert "--e2e-daemonset" in RealProxies(api, FakeAgents(api), "other", [NODE]).missing()
