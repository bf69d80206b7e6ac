"""A daemon that runs out of memory for a while: it keeps running, and programs every change when memory returns."""

from __future__ import annotations

import json
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

from tests.lab.modes import BOTH_MODES, mode_flag, rules_of
from tests.lab.proxy import Daemon
from tests.lab.topology import Lab
from tests.lab.waiting import wait_until

SERVICES = 1500
MEMORY_BELOW = 4_000_000
"""How far below the current size of the process the limit is, in bytes, so that larger allocations fail."""
GROWTH_LIMIT_KB = 40_000


def write(path: Path, first: int, count: int) -> set[str]:
    """Write Services with one endpoint each. Return their endpoints."""
    items: list[object] = []
    endpoints = set()
    for number in range(first, first + count):
        name, tail = f"s{number}", f"{number // 250}.{number % 250 + 1}"
        endpoints.add(f"10.244.{tail}:8080")
        items += [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": "ns"},
                "spec": {"clusterIP": f"10.97.{tail}", "ports": [{"port": 80, "protocol": "TCP"}]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "ports": [{"port": 8080, "protocol": "TCP"}],
                "endpoints": [{"addresses": [f"10.244.{tail}"], "conditions": {"ready": True}}],
            },
        ]
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    os.replace(part, path)
    return endpoints


def size_kb(pid: int, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@BOTH_MODES
def test_every_change_is_programmed_when_memory_returns(lab: Lab, tmp_path: Path, mode: str) -> None:
    objects, log = tmp_path / "objects", tmp_path / "kproxy.log"
    objects.mkdir()
    expected = write(objects / "first.json", 0, 5)
    rules = rules_of(mode, lab.node.namespace)
    with Daemon(lab, objects, log, mode_flag(mode)) as daemon:
        daemon.wait_until_synced()
        pid = daemon._running().pid
        before = size_kb(pid, "VmRSS")
        _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (size_kb(pid, "VmSize") * 1024 - MEMORY_BELOW, hard))
        begin = len(log.read_text())
        expected |= write(objects / "second.json", 5, SERVICES)
        with suppress(TimeoutError):  # the limit does not always hit anything
            wait_until(
                lambda: daemon.is_up() and re.search("memory|Memory|new thread", log.read_text()[begin:]),
                "kproxy runs out of memory",
            )
        expected |= write(objects / "third.json", 5 + SERVICES, 1)
        resource.prlimit(pid, resource.RLIMIT_AS, (hard, hard))
        wait_until(lambda: daemon.is_up() and expected <= rules.destinations(), "all endpoints are programmed")
        assert size_kb(pid, "VmRSS") - before < GROWTH_LIMIT_KB
