"""kproxy and another service proxy side by side: the same API server, node, changes and measurements, in turn."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from tests.bench.catalog import figures
from tests.bench.cluster import CLUSTER_CIDR
from tests.bench.daemon import IDLE_LOAD, POLL_INTERVAL, MeasuredDaemon
from tests.bench.figures import Figure
from tests.bench.kernel_objects import KernelObjects, kernel_objects
from tests.bench.measurements import Measurements, change_endpoints, change_many, change_services, connections
from tests.bench.sizes import Repetitions
from tests.bench.testbed import Testbed
from tests.bench.usage import cpu_seconds, descendants, memory_megabytes, own_cpu_seconds
from tests.lab.proxy import KPROXY

PLACEHOLDERS = ("master", "kubeconfig", "config", "hostname", "cluster_cidr", "mode")
PATIENCE = 60.0
CONNECT_TIMEOUT = 5.0

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_ISOLATED = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Runs a command in a PID namespace of its own. The kernel kills all of its processes when `unshare` is killed."""


class Proxy(Struct, frozen=True):
    """A service proxy: its name in the table, and its command, whose words may contain placeholders in braces."""

    name: str
    command: tuple[str, ...]


OURS = Proxy("kproxy", (KPROXY, "run", "--config={config}"))


def other_proxy(text: str) -> Proxy:
    """Parse the command line of another proxy. Raises `ValueError` with a message for the user."""
    words = shlex.split(text)
    if not words:
        raise ValueError("the command is empty")
    if unknown := [name for name in _PLACEHOLDER.findall(text) if name not in PLACEHOLDERS]:
        known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise ValueError(f"{{{unknown[0]}}}: unknown placeholder: choose from {known}")
    if shutil.which(words[0]) is None:
        raise ValueError(f"{words[0]}: command not found")
    program = next((word for word in words if word != "env" and not _ASSIGNMENT.match(word)), words[0])
    return Proxy(Path(program).name, tuple(words))


def filled(command: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """Return the command with its placeholders replaced."""
    return [_PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), word) for word in command]


def write_settings(testbed: Testbed) -> dict[str, str]:
    """Write a kubeconfig and a kube-proxy configuration file; return the values of all placeholders."""
    server, mode = testbed.api_server, testbed.mode
    kubeconfig, config = testbed.folder / "kubeconfig", testbed.folder / f"config-{mode}.yaml"
    kubeconfig.touch(0o600)
    kubeconfig.write_bytes(msgspec.json.encode(server.kubeconfig()))  # JSON is YAML
    config.write_bytes(
        msgspec.json.encode(
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": mode,
                "hostnameOverride": server.node_name,
                "clusterCIDR": CLUSTER_CIDR,
                "clientConnection": {"kubeconfig": str(kubeconfig)},
                "conntrack": {"maxPerCore": 0, "min": 0},  # these limits are not per network namespace
            }
        )
    )
    return {
        "master": server.url,
        "kubeconfig": str(kubeconfig),
        "config": str(config),
        "hostname": server.node_name,
        "cluster_cidr": CLUSTER_CIDR,
        "mode": mode,
    }


class IsolatedProxy(MeasuredDaemon):
    """A proxy that may consist of several processes. They run in a PID namespace, so that none can be left behind.

    CPU time and memory are those of all its processes.
    """

    def __enter__(self) -> Self:
        self._command = [*_ISOLATED, *self._command]
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # the first process of a PID namespace ignores SIGTERM unless it handles it
        self._process.wait()

    @property
    def cpu(self) -> float:
        """CPU seconds used so far by all processes, and by those that they have waited for."""
        total = 0.0
        for pid in descendants(self._process.pid):
            with suppress(OSError):  # the process has exited
                total += cpu_seconds(pid)
        return total

    @property
    def memory(self) -> tuple[float, float]:
        """The sums of current and peak resident memory of all running processes, in MB."""
        sizes = []
        for pid in descendants(self._process.pid):
            with suppress(OSError, KeyError):  # the process has exited
                sizes.append(memory_megabytes(pid))
        return sum(size[0] for size in sizes), sum(size[1] for size in sizes)

    def wait_until_programmed(self, testbed: Testbed) -> None:
        """Wait until the client can connect to all of its VIPs. Raises `RuntimeError` if the proxy exits or gives up.

        A proxy counts as having given up if it is idle for `patience` seconds.
        """
        active = time.monotonic()
        missing = list(testbed.vips)
        while missing:
            if self._is_busy():
                active = time.monotonic()
            if _connects(testbed, missing[0]):
                missing.pop(0)
            elif time.monotonic() - active > self._patience:
                address, port = missing[0]
                raise self.idle_error(f"has not programmed {address}:{port}")

    def _is_busy(self) -> bool:
        self.check()
        before = self._own_cpu()
        time.sleep(POLL_INTERVAL)
        return self._own_cpu() - before > IDLE_LOAD * POLL_INTERVAL

    def _own_cpu(self) -> float:
        """Return the CPU seconds of all running processes. It increases steadily only while no process exits."""
        total = 0.0
        for pid in descendants(self._process.pid):
            with suppress(OSError):
                total += own_cpu_seconds(pid)
        return total


def _connects(testbed: Testbed, target: tuple[str, int]) -> bool:
    with testbed.client.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        connection.settimeout(CONNECT_TIMEOUT)
        try:
            connection.connect(target)
        except OSError:
            return False
    return True


def measure_beside(
    testbed: Testbed, other: Proxy | None, repetitions: Repetitions, patience: float = PATIENCE
) -> list[Figure]:
    """Measure kproxy and another proxy in turn, on the same node. The other's figures are the baselines of kproxy's.

    Each of the `first_syncs` rounds starts each proxy on a node without rules and repeats all changes. Without `other`,
    only kproxy is measured, and its figures have no baselines.
    """
    values = write_settings(testbed)
    proxies = (OURS,) if other is None else (other, OURS)  # the other one first: an unusable command fails at once
    results = [Measurements(defaultdict(list), defaultdict(list)) for _ in proxies]
    for _ in range(repetitions.first_syncs):
        for proxy, result in zip(proxies, results, strict=True):
            testbed.flush_rules()
            log, command = testbed.folder / "proxy.log", filled(proxy.command, values)
            try:
                with IsolatedProxy(
                    testbed.node, testbed.monitor, command, log, name=proxy.name, patience=patience
                ) as daemon:
                    _measure(testbed, daemon, repetitions, result)
            finally:
                testbed.flush_rules()
    *theirs, ours = (figures(result.samples, {}) for result in results)
    if other is None:
        return ours
    measured = {figure.name: figure.measured for figure in theirs[0]}
    return [replace(each, baseline=measured.get(each.name), baseline_is=other.name) for each in ours]


def _measure(testbed: Testbed, daemon: IsolatedProxy, repetitions: Repetitions, result: Measurements) -> None:
    samples = result.samples
    daemon.wait_until_programmed(testbed)
    commits = daemon.wait_until_idle(daemon.started)
    samples["first sync"].append((commits[-1].time - daemon.started) / 1e9)
    samples["first sync: CPU"].append(daemon.cpu)
    samples["RSS after first sync"].append(daemon.memory[0])
    kernel = testbed.node.call(kernel_objects)
    for name in KernelObjects.__struct_fields__:
        samples[f"kernel: {name}"].append(getattr(kernel, name))
    connections(testbed, repetitions, result)
    if repetitions.endpoint_changes:
        change_endpoints(testbed, daemon, repetitions.endpoint_changes, result)
        change_services(testbed, daemon, repetitions.service_changes, result)
        for _ in range(repetitions.bursts):
            change_many(testbed, daemon, repetitions.burst_changes, result)
        samples["RSS after changes"].append(daemon.memory[0])
    samples["RSS at peak"].append(daemon.memory[1])
