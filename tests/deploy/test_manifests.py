"""What `kubectl kustomize` renders is valid, hangs together, and is what the daemon expects."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kproxy import __version__
from kproxy.config import Config
from kproxy.serve.health import HealthPages
from tests.deploy.kubeadm import config_map
from tests.deploy.rendered import DEPLOY, KUSTOMIZATIONS, OVERLAYS, ROOT, container, images, one, pod, render
from tests.deploy.settings import FOLDER, parsed

OLDEST, NEWEST = "1.29", "1.36"
CONTAINERS = ("sysctls", "kproxy")

EACH = pytest.mark.parametrize("name", KUSTOMIZATIONS)
EACH_OVERLAY = pytest.mark.parametrize("name", OVERLAYS)


@EACH
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid(name: str, version: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    objects = render(name)
    assert objects
    for item in objects:
        schemas.validate(item, version, strict=True)


@EACH
def test_the_schemas_tell_good_from_bad(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    broken = json.loads(json.dumps(one(render(name), "DaemonSet")))
    broken["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(schemas.ValidationError):
        schemas.validate(broken, NEWEST, strict=True)


@EACH
def test_everything_is_in_one_namespace_and_says_whose_it_is(name: str) -> None:
    kinds = {item["kind"]: item for item in render(name)}
    configured = {"ConfigMap"} if name != "replace-kube-proxy" else set()
    assert set(kinds) == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"} | configured
    for kind, item in kinds.items():
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "kproxy"
        assert item["metadata"].get("namespace") == (None if kind.startswith("ClusterRole") else "kube-system")


@EACH
def test_the_account_has_the_role(name: str) -> None:
    objects = render(name)
    account, binding = one(objects, "ServiceAccount")["metadata"], one(objects, "ClusterRoleBinding")
    subject = {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    assert binding["subjects"] == [subject]
    assert binding["roleRef"]["name"] == one(objects, "ClusterRole")["metadata"]["name"]
    assert pod(name)["serviceAccountName"] == account["name"]


@EACH
def test_it_runs_on_every_node_before_anything_else(name: str) -> None:
    daemon_set, spec = one(render(name), "DaemonSet")["spec"], pod(name)
    assert spec["hostNetwork"] is True
    assert spec["dnsPolicy"] == "Default"
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert daemon_set["updateStrategy"]["type"] == "RollingUpdate"
    labels = daemon_set["template"]["metadata"]["labels"]
    assert daemon_set["selector"]["matchLabels"].items() <= labels.items()


@EACH
def test_the_daemon_has_two_capabilities_and_cannot_write_its_root(name: str) -> None:
    assert container(name)["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsUser": 0,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@EACH
def test_only_the_container_that_sets_kernel_parameters_is_privileged(name: str) -> None:
    spec = pod(name)
    assert [item["name"] for item in spec["initContainers"]] == ["sysctls"]
    assert [item["name"] for item in spec["containers"]] == ["kproxy"]
    assert container(name, "sysctls")["securityContext"] == {"privileged": True, "readOnlyRootFilesystem": True}


@EACH
def test_both_containers_say_what_they_need(name: str) -> None:
    for called in CONTAINERS:
        assert set(container(name, called)["resources"]) == {"requests"}
        assert set(container(name, called)["resources"]["requests"]) == {"cpu", "memory"}


@EACH
def test_what_is_mounted_is_there(name: str) -> None:
    volumes = {item["name"]: item for item in pod(name)["volumes"]}
    used = {called: {item["name"]: item for item in container(name, called)["volumeMounts"]} for called in CONTAINERS}
    assert set(volumes) == set(used["sysctls"]) | set(used["kproxy"])
    assert volumes["modules"]["hostPath"]["path"] == used["kproxy"]["modules"]["mountPath"] == "/lib/modules"
    assert used["kproxy"]["modules"]["readOnly"] is True
    lock = {"path": "/run/xtables.lock", "type": "FileOrCreate"}
    assert volumes["xtables-lock"]["hostPath"] == lock
    assert used["kproxy"]["xtables-lock"]["mountPath"] == lock["path"]
    assert "readOnly" not in used["kproxy"]["xtables-lock"]


@EACH
def test_the_configuration_is_mounted_whole_so_that_changes_of_it_arrive(name: str) -> None:
    for called in CONTAINERS:
        (mount,) = (item for item in container(name, called)["volumeMounts"] if item["name"] == "config")
        assert mount == {"name": "config", "mountPath": FOLDER, "readOnly": True}


def settings(name: str, called: str, folder: Path, mode: str = "iptables") -> tuple[argparse.Namespace, Config]:
    """Parse a container's arguments with the daemon's own parser, and the file that they name."""
    return parsed(container(name, called), files_of(name, mode), folder)


def files_of(name: str, mode: str) -> dict[str, str]:
    if name == "replace-kube-proxy":
        return config_map("https://192.0.2.1:6443", cluster_cidr="10.244.0.0/16", mode=mode)
    files: dict[str, str] = one(render(name), "ConfigMap")["data"]
    return files


@EACH
def test_the_daemon_takes_flags_and_file_without_a_word(name: str, tmp_path: Path) -> None:
    options, config = settings(name, "kproxy", tmp_path)
    assert not options.init_only
    assert not options.cleanup
    assert config.hostname_override == "node-1"
    assert config.mode == "iptables"
    assert config.oom_score_adj == -997


@EACH
def test_the_first_container_only_prepares(name: str, tmp_path: Path) -> None:
    options, config = settings(name, "sysctls", tmp_path)
    assert options.init_only
    main = settings(name, "kproxy", tmp_path)[1]
    assert config.conntrack == main.conntrack
    assert config.iptables == main.iptables


@EACH
def test_the_node_is_named_by_the_cluster(name: str) -> None:
    for called in CONTAINERS:
        (given,) = (item for item in container(name, called)["env"] if item["name"] == "NODE_NAME")
        assert given["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


@EACH
def test_probes_ask_for_pages_that_are_served_where_they_ask(name: str, tmp_path: Path) -> None:
    config = settings(name, "kproxy", tmp_path)[1]
    of = container(name)
    ports = {item["name"]: item["containerPort"] for item in of["ports"]}
    assert config.healthz_bind_address.endswith(f":{ports['healthz']}")
    assert set(ports) == {"healthz"}  # metrics are for the node alone
    assert config.metrics_bind_address == "127.0.0.1:10249"
    wanted = {"startupProbe": "livez", "livenessProbe": "livez", "readinessProbe": "healthz"}
    for probe, page in wanted.items():
        assert of[probe]["httpGet"] == {"host": "127.0.0.1", "path": f"/{page}", "port": "healthz"}
        assert hasattr(HealthPages, page)


@EACH
def test_the_image_is_of_this_version_unless_it_is_for_kind(name: str) -> None:
    tag = "dev" if name == "kind" else __version__
    assert images(render(name)) == {f"localhost/kproxy:{tag}"}


@EACH
def test_a_changed_configuration_is_another_config_map(name: str) -> None:
    (volume,) = (item for item in pod(name)["volumes"] if item["name"] == "config")
    if name == "replace-kube-proxy":
        assert volume["configMap"] == {"name": "kube-proxy"}
    else:
        assert volume["configMap"]["name"] == one(render(name), "ConfigMap")["metadata"]["name"]
        assert volume["configMap"]["name"].startswith("kproxy-")


def test_in_kube_proxys_place_it_asks_the_server_that_kube_proxy_asked(tmp_path: Path) -> None:
    config = settings("replace-kube-proxy", "kproxy", tmp_path)[1]
    assert config.client_connection.kubeconfig == f"{FOLDER}/kubeconfig.conf"
    assert config.cluster_cidr == "10.244.0.0/16"
    names = [item["name"] for item in container("replace-kube-proxy")["env"]]
    assert names == ["NODE_NAME"]


@pytest.mark.parametrize("mode", ["iptables", "nftables", ""])
def test_in_kube_proxys_place_its_mode_counts(mode: str, tmp_path: Path) -> None:
    assert settings("replace-kube-proxy", "kproxy", tmp_path, mode)[1].mode == mode


def kind_config() -> Any:
    return yaml.safe_load((ROOT / "kind-config.yaml").read_text())


def test_kind_has_no_proxy_of_its_own_three_nodes_and_both_families() -> None:
    config = kind_config()
    assert config["networking"]["kubeProxyMode"] == "none"
    assert config["networking"]["ipFamily"] == "dual"
    assert [item["role"] for item in config["nodes"]] == ["control-plane", "worker", "worker"]


def test_in_kind_the_server_is_asked_for_by_the_name_of_its_node(tmp_path: Path) -> None:
    cluster = kind_config()
    given = {item["name"]: item.get("value") for item in container("kind")["env"]}
    assert given["KUBERNETES_SERVICE_HOST"] == f"{cluster['name']}-control-plane"
    assert given["KUBERNETES_SERVICE_PORT"] == "6443"
    config = settings("kind", "kproxy", tmp_path)[1]
    assert config.client_connection.kubeconfig == ""
    assert config.cluster_cidr == cluster["networking"]["podSubnet"]
    assert (config.conntrack.max_per_core, config.conntrack.min) == (0, 0)


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_the_image_starts_the_command_that_the_arguments_are_for() -> None:
    assert 'ENTRYPOINT ["kproxy"]' in dockerfile()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "kproxy" in project["scripts"]
    assert "command" not in container("base")


def test_everything_that_the_image_is_made_of_reaches_its_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for word in copied():
        assert (ROOT / word).exists()
        assert any(line.startswith(f"!{word.rstrip('/')}") for line in ignored) or word.startswith("deploy/image/")


def copied() -> Iterator[str]:
    for line in dockerfile().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            yield from line.split()[1:-1]


def test_no_file_of_the_folder_is_left_out_of_these_tests() -> None:
    folders = {path.parent for path in DEPLOY.rglob("kustomization.yaml")} - {DEPLOY / "site"}
    assert folders == {*KUSTOMIZATIONS.values(), DEPLOY / "components" / "metrics"}
