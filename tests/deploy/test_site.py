"""The kustomization `deploy/site` for one cluster: its image, and the component `metrics`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kubeadm import config_map
from tests.deploy.rendered import DEPLOY, ROOT, Object, build, container_of, images, one, pod_of, schemas
from tests.deploy.settings import parsed
from tests.deploy.site_kustomization import IMAGE, PAGES, kustomization, make_site
from tests.deploy.test_manifests import NEWEST, OLDEST

LOCAL = "127.0.0.1:10249"
COMPONENT = "components: [../components/metrics]"
BUILT_ON = {"replace-kube-proxy": "../overlays/replace-kube-proxy", "kind": "../overlays/kind", "base": "../base"}
EACH_BASE = pytest.mark.parametrize("base", BUILT_ON)


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_documented_commands_set_the_image(page: Path, tmp_path: Path) -> None:
    assert images(build(make_site(tmp_path, page))) == {IMAGE}


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_documented_commands_do_not_need_kustomize(page: Path) -> None:
    assert re.findall(r"\bkustomize (?:edit|build)\b", page.read_text()) == []


def test_kind_overlay_overrides_the_image_of_the_base(tmp_path: Path) -> None:
    make_site(tmp_path)
    base = tmp_path / "deploy/base/kustomization.yaml"
    document = yaml.safe_load(base.read_text())
    # As written by `kustomize edit set image`.
    document["images"] = [{"name": "kproxy", "newName": "registry.example/kproxy", "newTag": "0.1.0"}]
    base.write_text(yaml.safe_dump(document))
    assert images(build(tmp_path / "deploy/base")) == {IMAGE}
    assert images(build(tmp_path / "deploy/overlays/kind")) == {"localhost/kproxy:dev"}


def with_metrics(checkout: Path, base: str) -> list[Object]:
    make_site(checkout)
    return build(kustomization(checkout / "deploy/site", f"resources: [{BUILT_ON[base]}]", COMPONENT))


@EACH_BASE
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_with_metrics_are_valid(base: str, version: str, tmp_path: Path) -> None:
    for item in with_metrics(tmp_path, base):
        schemas().validate(item, version, strict=True)


@EACH_BASE
def test_component_exposes_metrics_and_changes_nothing_else(base: str, tmp_path: Path) -> None:
    objects = with_metrics(tmp_path, base)
    daemon = container_of(objects)
    assert daemon["args"].pop() == "--metrics-bind-address=0.0.0.0:10249"
    assert daemon["ports"].pop() == {"name": "metrics", "containerPort": 10249, "protocol": "TCP"}
    without_metrics = build(tmp_path / "deploy" / BUILT_ON[base].removeprefix("../"))
    assert objects == without_metrics


@EACH_BASE
def test_metrics_flag_overrides_the_configuration_file(base: str, tmp_path: Path) -> None:
    objects = with_metrics(tmp_path, base)
    for number, address in enumerate(("", LOCAL, "[::1]:9999")):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = config_map("https://192.0.2.1:6443", cluster_cidr="10.244.0.0/16", metricsBindAddress=address)
        assert parsed(container_of(objects), files, folder)[1].metrics_bind_address == "0.0.0.0:10249"


def test_documentation_shows_how_to_add_the_component(tmp_path: Path) -> None:
    page = PAGES["docs/operations.md"]
    assert f"```yaml\n{COMPONENT}\n```\n" in page.read_text()
    file = make_site(tmp_path, page) / "kustomization.yaml"
    file.write_text(f"{file.read_text()}{COMPONENT}\n")
    objects = build(file.parent)
    assert images(objects) == {IMAGE}
    assert "metrics" in ports(objects)


def ports(objects: list[Object]) -> dict[str, int]:
    return {item["name"]: item["containerPort"] for item in container_of(objects)["ports"]}


def pod_monitor() -> Any:
    return yaml.safe_load((DEPLOY / "monitoring/podmonitor.yaml").read_text())


@EACH_BASE
def test_pod_monitor_selects_the_pods_and_their_port(base: str, tmp_path: Path) -> None:
    objects, monitor = with_metrics(tmp_path, base), pod_monitor()
    labels = one(objects, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    assert monitor["metadata"]["namespace"] == one(objects, "DaemonSet")["metadata"]["namespace"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["spec"]["jobLabel"]] == "kproxy"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert ports(objects)[endpoint["port"]] == 10249
    assert pod_of(objects)["hostNetwork"] is True


def scrape_job() -> Any:
    text = (ROOT / "docs/operations.md").read_text()
    (block,) = re.findall(r"^```yaml\n(- job_name.*?)^```", text, re.MULTILINE | re.DOTALL)
    (job,) = yaml.safe_load(block)
    return job


def test_scrape_job_keeps_the_same_pods_and_port(tmp_path: Path) -> None:
    objects, job = with_metrics(tmp_path, "replace-kube-proxy"), scrape_job()
    kept = {rule["source_labels"][0]: rule["regex"] for rule in job["relabel_configs"] if rule.get("action") == "keep"}
    assert kept == {
        "__meta_kubernetes_pod_label_app_kubernetes_io_name": pod_label(objects),
        "__meta_kubernetes_pod_container_port_name": "metrics",
    }
    assert "metrics" in ports(objects)
    assert job["job_name"] == "kproxy"


def pod_label(objects: list[Object]) -> str:
    labels: dict[str, str] = one(objects, "DaemonSet")["spec"]["template"]["metadata"]["labels"]
    return labels["app.kubernetes.io/name"]


def test_pod_monitor_and_scrape_job_set_the_same_instance_label() -> None:
    (rule,) = pod_monitor()["spec"]["podMetricsEndpoints"][0]["relabelings"]
    renamed = [each for each in scrape_job()["relabel_configs"] if "target_label" in each]
    assert renamed == [{"source_labels": rule["sourceLabels"], "target_label": rule["targetLabel"]}]
