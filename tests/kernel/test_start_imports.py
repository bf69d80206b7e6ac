"""Which modules a daemon has loaded when it has programmed its first Service."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from kproxy.__main__ import GC_THRESHOLD
from tests.bench import testbed as bench
from tests.bench.cluster import CLUSTER_CIDR, Cluster
from tests.lab.modes import BOTH_MODES
from tests.lab.topology import NODE
from tests.lab.waiting import HANG_GUARD, wait_until

DAEMON = """
import gc, sys
from kproxy.__main__ import main
code = main()
print(code, gc.get_threshold()[0], *sys.modules)
"""
"""A daemon that prints its exit code, a setting and the modules that it has loaded by the time it is stopped."""

UNUSED = {"prometheus_client", "kubernetes", "pyroute2", "iptc", "yaml", "shtab", "difflib", "http.server", "tarfile"}
"""Packages and modules that only other commands, other configurations or a scrape of the metrics need."""


@BOTH_MODES
def test_first_sync_loads_only_what_it_needs(mode: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    with bench.Testbed(mode, Cluster(1, 10), tmp_path) as testbed, output.open("w") as file:
        start = time.monotonic_ns()
        flags = [f"--proxy-mode={mode}", f"--hostname-override={NODE}", f"--cluster-cidr={CLUSTER_CIDR}"]
        flags += [f"--master={testbed.api_server.url}", "--conntrack-max-per-core=0", "--conntrack-min=0"]
        daemon = testbed.node.popen([sys.executable, "-c", DAEMON, "run", *flags], file)
        try:
            wait_until(lambda: testbed.monitor.since(start) or daemon.poll() is not None, "the first commit")
            daemon.terminate()
            daemon.wait(HANG_GUARD)
        finally:
            daemon.kill()
    code, threshold, *modules = output.read_text().splitlines()[-1].split()
    assert (code, int(threshold)) == ("0", GC_THRESHOLD), output.read_text()
    loaded = set(modules)
    other = "iptables" if mode == "nftables" else "nftables"
    assert {f"kproxy.{mode}.backend", "urllib3", "kproxy.serve.metrics"} <= loaded
    assert loaded & UNUSED == set()
    assert loaded & {f"kproxy.{other}.backend", "kproxy.serve.metrics_page", "kproxy.serve.localhost_proxy"} == set()
