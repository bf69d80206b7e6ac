"""The real cluster's parts that need no cluster: manifests, what is read of objects, and the proxies' changes."""

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
def test_manifests_are_what_the_api_takes(manifest: Object) -> None:
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


def test_nodes_that_take_pods_and_of_the_others_none() -> None:
    found = [
        node("b"),
        node("a"),
        node("control-plane", **RESERVED),
        node("cordoned", unschedulable=True),
        node("lost", ready="Unknown"),
    ]
    assert [each.name for each in objects.usable_nodes(found)] == ["a", "b"]
    assert objects.usable_nodes(found)[0] == Node("a", {"IPv4": "192.0.2.1", "IPv6": "2001:db8::1"}, "a")


def test_a_control_plane_where_there_is_nothing_else() -> None:
    found = [node("control-plane", **RESERVED), node("lost", ready="False")]
    assert [each.name for each in objects.usable_nodes(found)] == ["control-plane"]


def test_a_pod_that_is_being_deleted_is_not_ready() -> None:
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
def test_a_rollout_is_over_when_every_node_has_the_present_form(change: dict[str, int], done: bool) -> None:
    status = {
        "observedGeneration": 2,
        "desiredNumberScheduled": 3,
        "updatedNumberScheduled": 3,
        "numberAvailable": 3,
    }
    assert rolled_out({"metadata": {"generation": 2}, "status": status | change}) is done


def test_another_mode_leaves_all_else_as_it_is() -> None:
    files = {"config.conf": "mode: iptables\nclusterCIDR: 10.244.0.0/16\n", "kubeconfig.conf": "text"}
    changed = with_mode(files, "nftables")
    assert yaml.safe_load(changed["config.conf"]) == {"mode": "nftables", "clusterCIDR": "10.244.0.0/16"}
    assert changed["kubeconfig.conf"] == "text"
    assert selector_text({"b": "2", "a": "1"}) == "a=1,b=2"


class Controlled(Api):
    """An API server with two DaemonSets on one node, whose changes are carried out at once."""

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
            for name, each in self.sets.items()
            if REPLACED_LABEL not in each["spec"]["template"]["spec"]["nodeSelector"]
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
        """The mode of the configuration that kproxy's pods hold."""
        (volume,) = self.sets["kproxy"]["spec"]["template"]["spec"]["volumes"]
        files = self.config_maps[volume["configMap"]["name"]]
        return str(yaml.safe_load(files["config.conf"])["mode"])


class Asking(Agents):
    """What a node's kproxy says of itself."""

    def __init__(self, api: Controlled) -> None:
        self._controlled = api

    def get(self, node: str, url: str) -> tuple[int, str]:
        assert (node, url) == (NODE.name, "http://127.0.0.1:10249/proxyMode")
        return 200, self._controlled.mode()


@pytest.fixture
def api() -> Controlled:
    return Controlled()


@pytest.fixture
def proxies(api: Controlled) -> Iterator[RealProxies]:
    before = copy.deepcopy((api.sets, api.config_maps))
    yield RealProxies(api, Asking(api), "kproxy", [NODE])
    assert (api.sets, api.config_maps) == before, "all is as it was, whatever happened in between"


def test_a_mode_lasts_as_long_as_its_block(api: Controlled, proxies: RealProxies) -> None:
    with proxies.in_mode("nftables"):
        assert proxies.mode() == "nftables"
        assert api.config_maps["kproxy-abc"] == {"config.conf": "mode: iptables\n"}
    assert proxies.mode() == "iptables"


def test_a_mode_ends_with_a_failure_too(proxies: RealProxies) -> None:
    with pytest.raises(ZeroDivisionError), proxies.in_mode("nftables"):
        raise ZeroDivisionError


def test_the_mode_that_it_is_in_changes_nothing(api: Controlled, proxies: RealProxies) -> None:
    with proxies.in_mode("iptables"):
        assert set(api.config_maps) == {"kproxy-abc", "kube-proxy"}


def test_kube_proxy_and_kproxy_never_run_at_once(api: Controlled, proxies: RealProxies) -> None:
    assert proxies.lacks_kube_proxy() == ""
    with proxies.replaced_by_kube_proxy():
        assert api.running[-1] == {"kube-proxy"}
    assert api.running == [{"kproxy"}, set(), {"kube-proxy"}, set(), {"kproxy"}]


def test_a_swap_ends_with_a_failure_too(proxies: RealProxies) -> None:
    with pytest.raises(ZeroDivisionError), proxies.replaced_by_kube_proxy():
        raise ZeroDivisionError


def test_what_a_swap_lacks(api: Controlled) -> None:
    proxies = RealProxies(api, Asking(api), "kproxy", [NODE])
    for mode in ("ipvs", '""'):
        api.config_maps["kube-proxy"] = {"config.conf": f"mode: {mode}\n"}
        assert "set iptables or nftables" in proxies.lacks_kube_proxy()
    del api.sets["kube-proxy"]["spec"]["template"]["spec"]["nodeSelector"][REPLACED_LABEL]
    assert "is not disabled" in proxies.lacks_kube_proxy()
    del api.sets["kube-proxy"]
    assert "has no DaemonSet kube-system/kube-proxy" in proxies.lacks_kube_proxy()
    assert proxies.missing() == ""
    assert "--e2e-daemonset" in RealProxies(api, Asking(api), "other", [NODE]).missing()
