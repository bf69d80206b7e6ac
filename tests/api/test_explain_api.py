"""`kproxy explain` reads what it needs from the API server, with the caller's own credentials."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kproxy.cli.console import CannotTellError
from kproxy.cli.explain import gather
from kproxy.cli.parser import parse
from kproxy.config import configure
from kproxy.diagnose.cluster_reader import ClusterReadError, own_kubeconfig
from kproxy.diagnose.explain import explain
from kproxy.diagnose.explain_report import ServiceExplanation
from tests.apiserver import ApiServer
from tests.unit.explain_cases import BROKEN, SOUND, SetUp

ABOUT_PODS = {"NoEndpoints", "NoReadyEndpoints", "TargetPortUnresolved", "OnlyTerminating", "FamilyMissing"}
SAME = [
    setup
    for setup in (*BROKEN, *SOUND)
    if setup.code not in ABOUT_PODS or "kind: Pod\n" in setup.yaml or "selector: {app: api}" not in setup.yaml
]
"""Set-ups about which files say as much as the API server. Files without Pods do not say that there are no Pods."""


PLAIN = next(setup for setup in SOUND if setup.name == "ClusterIP")


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer(tokens=["mine"]) as server:
        yield server


def fill(api: ApiServer, setup: SetUp) -> None:
    for each in yaml.safe_load_all(setup.yaml):
        api.create(each)


def explained(api: ApiServer, folder: Path, setup: SetUp, *, token: str = "mine") -> ServiceExplanation:
    kubeconfig = api.kubeconfig(folder / "kubeconfig", token=token)
    flags = [f"--kubeconfig={kubeconfig}", "--hostname-override=node-1", "--kernel=false", *setup.flags]
    client = [f"--from={setup.client}"] if setup.client else []
    options = parse(["explain", setup.key, *flags, *client])
    return explain(gather(options, configure(options)[0], setup.key), setup.client)


def code(report: ServiceExplanation) -> str | None:
    return report.reason.code if report.reason else None


@pytest.mark.parametrize("setup", SAME, ids=lambda setup: setup.name)
def test_the_reasons_are_those_of_the_same_objects_in_files(setup: SetUp, api: ApiServer, tmp_path: Path) -> None:
    fill(api, setup)
    report = explained(api, tmp_path, setup)
    assert (report.verdict, code(report)) == (setup.verdict, setup.code)


def test_only_what_the_service_needs_is_read(api: ApiServer, tmp_path: Path) -> None:
    fill(api, PLAIN)
    explained(api, tmp_path, PLAIN)
    seen = [(each.method, each.path, each.query.get("labelSelector", "")) for each in api.requests.all()]
    assert all(method == "GET" for method, _, _ in seen)
    assert [(path, selector) for _, path, selector in seen] == [
        ("/api/v1/services", ""),
        ("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices", "kubernetes.io/service-name=api"),
        ("/api/v1/nodes/node-1", ""),
        ("/api/v1/namespaces/shop/pods", "app=api"),
        ("/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies", ""),
    ]


def test_what_is_forbidden_is_said(api: ApiServer, tmp_path: Path) -> None:
    fill(api, next(setup for setup in BROKEN if setup.name == "crashing pods"))
    api.faults.hidden = {"pods": 403, "networkpolicies": 403}
    report = explained(api, tmp_path, PLAIN)
    assert code(report) == "NoReadyEndpoints"  # without the Pods, no better reason is known
    assert any("pods" in text and "forbidden" in text for text in report.unseen)


def test_without_slices_nothing_is_concluded(api: ApiServer, tmp_path: Path) -> None:
    fill(api, PLAIN)
    api.faults.hidden = {"endpointslices": 403}
    with pytest.raises(CannotTellError, match="endpointslices"):
        explained(api, tmp_path, PLAIN)


def test_wrong_credentials(api: ApiServer, tmp_path: Path) -> None:
    with pytest.raises(CannotTellError, match=r"Unauthorized|401"):
        explained(api, tmp_path, PLAIN, token="wrong")


def test_choice_of_the_kubeconfig(tmp_path: Path) -> None:
    environment: dict[str, Any] = {"HOME": str(tmp_path)}
    with pytest.raises(ClusterReadError, match="--kubeconfig"):
        own_kubeconfig(None, environment)
    default = tmp_path / ".kube/config"
    default.parent.mkdir()
    default.write_text("")
    assert own_kubeconfig(None, environment) == str(default)
    assert own_kubeconfig(None, {**environment, "KUBECONFIG": "/a:/b"}) == "/a"
    assert own_kubeconfig("/mine", {**environment, "KUBECONFIG": "/a"}) == "/mine"
