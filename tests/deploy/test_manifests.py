"""The rendered manifests are valid, consistent, and match the daemon's flags, files and ports."""

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
from tests.deploy.rendered import DEPLOY, KUSTOMIZATIONS, OVERLAYS, ROOT, container, images, one, pod, render, schemas
from tests.deploy.settings import FOLDER, parsed

OLDEST, NEWEST = "1.29", "1.36"
CONTAINERS = ("sysctls", "kproxy")

EACH = pytest.mark.parametrize("name", KUSTOMIZATIONS)
EACH_OVERLAY = pytest.mark.parametrize("name", OVERLAYS)


@EACH
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid(name: str, version: str) -> None:
    objects = render(name)
    assert objects
    for item in objects:
        schemas().validate(item, version, strict=True)


@EACH
def test_schemas_reject_a_misspelled_field(name: str) -> None:
    validator = schemas()
    broken = json.loads(json.dumps(one(render(name), "DaemonSet")))
    broken["spec"]["template"]["spec"]["hostNetwrok"] = True
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, NEWEST, strict=True)


@EACH
def test_objects_are_labeled_and_in_kube_system(name: str) -> None:
    kinds = {item["kind"]: item for item in render(name)}
    configured = {"ConfigMap"} if name != "replace-kube-proxy" else set()
    assert set(kinds) == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet"} | configured
    for kind, item in kinds.items():
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "kproxy"
        assert item["metadata"].get("namespace") == (None if kind.startswith("ClusterRole") else "kube-system")


@EACH
def test_service_account_is_bound_to_the_role(name: str) -> None:
    objects = render(name)
    account, binding = one(objects, "ServiceAccount")["metadata"], one(objects, "ClusterRoleBinding")
    subject = {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    assert binding["subjects"] == [subject]
    assert binding["roleRef"]["name"] == one(objects, "ClusterRole")["metadata"]["name"]
    assert pod(name)["serviceAccountName"] == account["name"]


@EACH
def test_daemon_set_runs_on_every_node_with_critical_priority(name: str) -> None:
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
def test_daemon_has_two_capabilities_and_a_read_only_root(name: str) -> None:
    assert container(name)["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsUser": 0,
        "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@EACH
def test_only_the_init_container_is_privileged(name: str) -> None:
    spec = pod(name)
    assert [item["name"] for item in spec["initContainers"]] == ["sysctls"]
    assert [item["name"] for item in spec["containers"]] == ["kproxy"]
    assert container(name, "sysctls")["securityContext"] == {"privileged": True, "readOnlyRootFilesystem": True}


@EACH
def test_containers_have_resource_requests_without_limits(name: str) -> None:
    for each in CONTAINERS:
        assert set(container(name, each)["resources"]) == {"requests"}
        assert set(container(name, each)["resources"]["requests"]) == {"cpu", "memory"}


@EACH
def test_volumes_match_the_mounts(name: str) -> None:
    volumes = {item["name"]: item for item in pod(name)["volumes"]}
    used = {each: {item["name"]: item for item in container(name, each)["volumeMounts"]} for each in CONTAINERS}
    assert set(volumes) == set(used["sysctls"]) | set(used["kproxy"])
    assert volumes["modules"]["hostPath"]["path"] == used["kproxy"]["modules"]["mountPath"] == "/lib/modules"
    assert used["kproxy"]["modules"]["readOnly"] is True
    lock = {"path": "/run/xtables.lock", "type": "FileOrCreate"}
    assert volumes["xtables-lock"]["hostPath"] == lock
    assert used["kproxy"]["xtables-lock"]["mountPath"] == lock["path"]
    assert "readOnly" not in used["kproxy"]["xtables-lock"]


@EACH
def test_configuration_is_mounted_as_a_directory_so_that_updates_arrive(name: str) -> None:
    for each in CONTAINERS:
        (mount,) = (item for item in container(name, each)["volumeMounts"] if item["name"] == "config")
        assert mount == {"name": "config", "mountPath": FOLDER, "readOnly": True}


def settings(name: str, container_name: str, folder: Path, mode: str = "iptables") -> tuple[argparse.Namespace, Config]:
    """Parse a container's arguments and configuration file with the daemon's parser."""
    return parsed(container(name, container_name), files_of(name, mode), folder)


def files_of(name: str, mode: str) -> dict[str, str]:
    if name == "replace-kube-proxy":
        return config_map("https://192.0.2.1:6443", cluster_cidr="10.244.0.0/16", mode=mode)
    files: dict[str, str] = one(render(name), "ConfigMap")["data"]
    return files


@EACH
def test_daemon_accepts_flags_and_file_without_warnings(name: str, tmp_path: Path) -> None:
    options, config = settings(name, "kproxy", tmp_path)
    assert not options.init_only
    assert not options.cleanup
    assert config.hostname_override == "node-1"
    assert config.mode == "iptables"
    assert config.oom_score_adj == -997


@EACH
def test_init_container_runs_with_init_only_and_the_same_settings(name: str, tmp_path: Path) -> None:
    options, config = settings(name, "sysctls", tmp_path)
    assert options.init_only
    main = settings(name, "kproxy", tmp_path)[1]
    assert config.conntrack == main.conntrack
    assert config.iptables == main.iptables


@EACH
def test_node_name_comes_from_the_pod_specification(name: str) -> None:
    for each in CONTAINERS:
        (variable,) = (item for item in container(name, each)["env"] if item["name"] == "NODE_NAME")
        assert variable["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


@EACH
def test_probes_request_existing_pages_at_the_configured_address(name: str, tmp_path: Path) -> None:
    config = settings(name, "kproxy", tmp_path)[1]
    spec = container(name)
    ports = {item["name"]: item["containerPort"] for item in spec["ports"]}
    assert config.healthz_bind_address.endswith(f":{ports['healthz']}")
    assert set(ports) == {"healthz"}  # metrics are served only on localhost
    assert config.metrics_bind_address == "127.0.0.1:10249"
    pages = {"startupProbe": "livez", "livenessProbe": "livez", "readinessProbe": "healthz"}
    for probe, page in pages.items():
        assert spec[probe]["httpGet"] == {"host": "127.0.0.1", "path": f"/{page}", "port": "healthz"}
        assert hasattr(HealthPages, page)


@EACH
def test_image_tag_is_this_version_or_dev_for_kind(name: str) -> None:
    tag = "dev" if name == "kind" else __version__
    assert images(render(name)) == {f"localhost/kproxy:{tag}"}


@EACH
def test_config_map_name_depends_on_its_content(name: str) -> None:
    (volume,) = (item for item in pod(name)["volumes"] if item["name"] == "config")
    if name == "replace-kube-proxy":
        assert volume["configMap"] == {"name": "kube-proxy"}
    else:
        assert volume["configMap"]["name"] == one(render(name), "ConfigMap")["metadata"]["name"]
        assert volume["configMap"]["name"].startswith("kproxy-")


def test_replacement_uses_the_api_server_of_kube_proxy(tmp_path: Path) -> None:
    config = settings("replace-kube-proxy", "kproxy", tmp_path)[1]
    assert config.client_connection.kubeconfig == f"{FOLDER}/kubeconfig.conf"
    assert config.cluster_cidr == "10.244.0.0/16"
    names = [item["name"] for item in container("replace-kube-proxy")["env"]]
    assert names == ["NODE_NAME"]


@pytest.mark.parametrize("mode", ["iptables", "nftables", ""])
def test_replacement_uses_the_mode_of_kube_proxy(mode: str, tmp_path: Path) -> None:
    assert settings("replace-kube-proxy", "kproxy", tmp_path, mode)[1].mode == mode


def kind_config() -> Any:
    return yaml.safe_load((ROOT / "kind-config.yaml").read_text())


def test_kind_cluster_has_no_kube_proxy_three_nodes_and_is_dual_stack() -> None:
    config = kind_config()
    assert config["networking"]["kubeProxyMode"] == "none"
    assert config["networking"]["ipFamily"] == "dual"
    assert [item["role"] for item in config["nodes"]] == ["control-plane", "worker", "worker"]


def test_kind_uses_the_name_of_the_control_plane_node_as_api_server(tmp_path: Path) -> None:
    cluster = kind_config()
    environment = {item["name"]: item.get("value") for item in container("kind")["env"]}
    assert environment["KUBERNETES_SERVICE_HOST"] == f"{cluster['name']}-control-plane"
    assert environment["KUBERNETES_SERVICE_PORT"] == "6443"
    config = settings("kind", "kproxy", tmp_path)[1]
    assert config.client_connection.kubeconfig == ""
    assert config.cluster_cidr == cluster["networking"]["podSubnet"]
    assert (config.conntrack.max_per_core, config.conntrack.min) == (0, 0)


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_entrypoint_of_the_image_is_kproxy() -> None:
    assert 'ENTRYPOINT ["kproxy"]' in dockerfile()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "kproxy" in project["scripts"]
    assert "command" not in container("base")


def test_files_copied_into_the_image_are_not_ignored_by_docker() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for word in copied():
        assert (ROOT / word).exists()
        assert any(line.startswith(f"!{word.rstrip('/')}") for line in ignored) or word.startswith("deploy/image/")


def copied() -> Iterator[str]:
    for line in dockerfile().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            yield from line.split()[1:-1]


def test_all_kustomizations_are_tested() -> None:
    folders = {path.parent for path in DEPLOY.rglob("kustomization.yaml")} - {DEPLOY / "site"}
    assert folders == {*KUSTOMIZATIONS.values(), DEPLOY / "components" / "metrics"}
