"""kproxy patches single rules only with iptables versions that support it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kproxy.app.backends import make_families
from kproxy.config import Config
from kproxy.model.types import Endpoint, EndpointPort, EndpointSlice, Family, Service, ServicePort
from tests.inprocess import EMPTY_LISTS, InProcessProxy
from tests.lab.namespace import Namespace

VERSION_SCRIPT = '#!/bin/sh\nif [ "$1" = --version ]; then echo "iptables {version}"; else exec {program} "$@"; fi\n'
RECORDING_SCRIPT = '#!/bin/sh\ntee -a {inputs} | {program} "$@"\n'
SINGLE_RULES = ("-I ", "-R ", "-D ")


class IptablesWrappers:
    """Wrappers of iptables in PATH that report a version and record the input of iptables-restore."""

    def __init__(self, folder: Path, version: str) -> None:
        self._inputs = folder / "inputs"
        for name in ("iptables", "ip6tables"):
            self._install(folder / name, VERSION_SCRIPT, version=version)
            self._install(folder / f"{name}-restore", RECORDING_SCRIPT, inputs=self._inputs)

    def _install(self, path: Path, script: str, **words: object) -> None:
        path.write_text(script.format(program=shutil.which(path.name), **words))
        path.chmod(0o755)

    def take(self) -> str:
        """Return the input of iptables-restore since the last call."""
        found = self._inputs.read_text()
        self._inputs.unlink()
        return found


def sync_endpoints(proxy: InProcessProxy, numbers: range) -> None:
    """Set the endpoints of the Service ns/a in both families and sync."""
    for family, prefix in ((Family.IPV4, "10.244.1."), (Family.IPV6, "fd00:10:244:1::")):
        endpoints = tuple(Endpoint(f"{prefix}{number}", "node-2") for number in numbers)
        ports = (EndpointPort("http", 8080, "TCP"),)
        proxy.put(EndpointSlice("ns", f"a-{family.value}", "ns/a", family, endpoints, ports))
    proxy.sync()


@pytest.mark.parametrize(
    ("version", "expected"),
    [("v1.8.4 (nf_tables)", False), ("v1.8.5 (nf_tables)", True), ("v1.8.9 (legacy)", False)],
)
def test_single_rules_are_patched_only_by_some_versions(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, expected: bool
) -> None:
    wrappers = IptablesWrappers(tmp_path, version)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    families = namespace.call(lambda: make_families(Config(mode="iptables"), []))
    proxies = [InProcessProxy({family: sync}, namespace=namespace) for family, sync in families.items()]
    service = Service("ns", "a", ("10.96.0.1", "fd00:10:96::1"), (ServicePort("http", 80, "TCP"),))
    for proxy in proxies:
        proxy.apply(*EMPTY_LISTS).put(service)
        sync_endpoints(proxy, range(10, 20))
    wrappers.take()
    for proxy in proxies:
        sync_endpoints(proxy, range(11, 20))
        changes = [line for line in wrappers.take().splitlines() if line.startswith(("-A KUBE-SVC-", *SINGLE_RULES))]
        assert {line.startswith(SINGLE_RULES) for line in changes} == {expected}
