"""The cluster of the end-to-end tests: the one of KUBECONFIG, or one of network namespaces on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol
from zlib import crc32

import pytest

from tests.e2e.cluster import Cluster, IpFamily, Need
from tests.e2e.local import unavailable
from tests.e2e.local.cluster import LocalClusters
from tests.e2e.real import DEFAULT_IMAGE, RealClusters

CLUSTER = pytest.StashKey[Cluster]()
MAX_NAMESPACE = 63
"""Maximum length of the name of a namespace: that of a label (RFC 1123)."""


class Clusters(Protocol):
    """One cluster for the session."""

    def test(self, name: str) -> AbstractContextManager[Cluster]: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("end-to-end tests")
    group.addoption("--e2e-image", default=DEFAULT_IMAGE, help="image of the pods (default: %(default)s)")
    group.addoption(
        "--e2e-daemonset", default="kproxy", help="kproxy's DaemonSet in kube-system (default: %(default)s)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "needs(*requirements): skip the test on a cluster that does not meet one of these requirements"
    )


@pytest.fixture(scope="session")
def clusters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    """The cluster. A KUBECONFIG that does not work is an error, not a reason to skip."""
    kubeconfig = os.environ.get("KUBECONFIG", "")
    if kubeconfig:
        # The defaults are repeated: pytest knows the options only if it is started with this folder.
        image = request.config.getoption("--e2e-image", DEFAULT_IMAGE)
        daemonset = request.config.getoption("--e2e-daemonset", "kproxy")
        with RealClusters(kubeconfig, str(image), str(daemonset)) as real:
            yield real
    elif reason := unavailable():
        pytest.skip(f"KUBECONFIG is not set, and this machine cannot emulate a cluster: {reason}")
    else:
        with LocalClusters(tmp_path_factory.mktemp("cluster")) as local:
            yield local


@pytest.fixture
def cluster(clusters: Clusters, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster, with a namespace for this test."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_")).strip("-")
    if len(name) > MAX_NAMESPACE:
        name = f"{name[: MAX_NAMESPACE - 9]}-{crc32(name.encode()):08x}"
    with clusters.test(name) as cluster:
        for marker in request.node.iter_markers("needs"):
            for need in marker.args:
                _skip_without(cluster, need)
        request.node.stash[CLUSTER] = cluster
        yield cluster


@pytest.fixture(params=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest, cluster: Cluster) -> IpFamily:
    """Each IP family of the cluster."""
    family: IpFamily = request.param
    _skip_without(cluster, family)
    needed = {need for marker in request.node.iter_markers("needs") for need in marker.args}
    if "outside" in needed and family == "IPv6":
        _skip_without(cluster, "outside over IPv6")
    return family


def _skip_without(cluster: Cluster, need: Need) -> None:
    if reason := cluster.lacks(need):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Add the state of the cluster to the report of a failed test."""
    report = yield
    if report.when == "call" and report.failed and (cluster := item.stash.get(CLUSTER, None)):
        report.sections.append(("the cluster", cluster.diagnose()))
    return report
