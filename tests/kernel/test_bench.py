"""`make bench` with the smallest clusters: it measures all figures. Also tests its monitors and counters."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from tests.bench.api_server import BenchApiServer
from tests.bench.catalog import CATALOG, NAMES
from tests.bench.chart import SHOWN
from tests.bench.cluster import Cluster
from tests.bench.commit_monitor import CommitMonitor
from tests.bench.figures import Results
from tests.bench.kernel_objects import KernelObjects, flush, kernel_objects
from tests.bench.replay import RecordingProxy, replay
from tests.lab.namespace import Namespace
from tests.lab.transaction_monitor import TransactionMonitor
from tests.lab.waiting import HANG_GUARD, wait_until

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def namespace(namespace: Namespace) -> Namespace:
    """A new namespace whose loopback interface is up."""
    namespace.run(["ip", "link", "set", "lo", "up"])
    return namespace


def bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.bench", *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_figures_are_present(kernel: None, tmp_path: Path) -> None:
    found, drawn = tmp_path / "bench.json", tmp_path / "bench.svg"
    output = bench("--size=tiny", f"--json={found}", f"--chart={drawn}")
    results = msgspec.json.decode(found.read_bytes(), type=Results)
    assert [(run.mode, run.services) for run in results.runs] == [
        (mode, services) for mode in ("iptables", "nftables") for services in (1, 20)
    ]
    with_floor = {each.name for each in CATALOG if each.baseline_is}
    for run in results.runs:
        if run.services > 1:
            expected_names = {each.name for each in CATALOG if each.mode in {"", run.mode}}
            assert [each.name for each in run.figures] == [name for name in NAMES if name in expected_names]
            assert {each.name for each in run.figures if each.baseline} == with_floor & expected_names
        for figure in run.figures:
            assert figure.name in output
            if not figure.name.startswith("kernel: "):
                assert figure.measured.value > 0
    panels = ElementTree.fromstring(drawn.read_text()).itertext()
    text = "\n".join(panels)
    assert all(name in text for name in SHOWN)

    compared = bench(f"--read={found}", f"--compare={found}", f"--chart={drawn}")
    assert "new / old" in compared
    assert "1.00" in compared


def test_each_transaction_gives_one_notification(namespace: Namespace) -> None:
    with TransactionMonitor(namespace) as commits, CommitMonitor(namespace) as monitor:
        before = time.monotonic_ns()
        for name in ("A", "B", "C"):
            namespace.run(["iptables", "-N", name])
        made = commits.new()
        wait_until(lambda: len(monitor.since(before)) == len(made), "one notification per transaction")
        times = [each.time for each in monitor.since(before)]
        assert len(made) >= 3
        assert times == sorted(times)
        assert all(each.process == "iptables" for each in monitor.since(before))
        assert monitor.since(times[-1]) == []
        monitor.clear()
        assert monitor.since(0) == []


def test_kernel_objects_are_counted_and_flushed(namespace: Namespace) -> None:
    assert namespace.call(kernel_objects) == KernelObjects(0, 0, 0, 0)
    namespace.run(["iptables", "-N", "ONE"])
    namespace.run(["iptables", "-A", "ONE", "-j", "ACCEPT"])
    namespace.run(["ip6tables", "-N", "TWO"])
    namespace.run(["ip6tables", "-A", "TWO", "-j", "ACCEPT"])
    namespace.run(["ip6tables", "-A", "TWO", "-j", "DROP"])
    found = namespace.call(kernel_objects)
    assert (found.rules, found.sets, found.elements) == (3, 0, 0)
    assert found.chains >= 2
    namespace.call(flush)
    assert namespace.call(kernel_objects) == KernelObjects(0, 0, 0, 0)


def test_each_endpoint_is_one_element(namespace: Namespace) -> None:
    def elements(cluster: Cluster) -> int:
        RecordingProxy("nftables", cluster).change()
        found = kernel_objects().elements
        flush()
        return found

    few, more = (namespace.call(partial(elements, Cluster(3, endpoints))) for endpoints in (2, 4))
    assert more - few == 3 * 2


def test_replay_creates_the_recorded_objects(namespace: Namespace) -> None:
    def record_and_replay() -> tuple[KernelObjects, KernelObjects, float]:
        everything = RecordingProxy("iptables", Cluster(3, 2)).change()
        made = kernel_objects()
        flush()
        cost = replay(everything, monitor)
        return made, kernel_objects(), cost.seconds

    with CommitMonitor(namespace) as monitor:
        made, again, seconds = namespace.call(record_and_replay)
        assert made == again
        assert made.rules > 3 * 2
        assert seconds > 0


def test_api_server_serves_a_cluster_and_records_write_times(namespace: Namespace) -> None:
    cluster = Cluster(5, 2)
    with BenchApiServer(namespace) as server:
        server.load(cluster)
        host, _, port = server.url.removeprefix("http://").partition(":")
        http = HTTPConnection(host, int(port))
        http.sock = namespace.socket(socket.AF_INET, socket.SOCK_STREAM)
        http.sock.settimeout(HANG_GUARD)
        http.sock.connect((host, int(port)))
        http.request("GET", "/apis/discovery.k8s.io/v1/endpointslices?watch=1")
        answer = http.getresponse()
        lines = [msgspec.json.decode(answer.readline()) for _ in range(5)]
        assert {each["object"]["metadata"]["name"] for each in lines} == {
            cluster.endpoint_slice(number)["metadata"]["name"] for number in range(5)
        }
        assert server.drain_traffic().events == 5
        before = time.monotonic_ns()
        server.change(put=[cluster.endpoint_slice(2, variant=1)], delete=[cluster.endpoint_slice(3)])
        assert [msgspec.json.decode(answer.readline())["type"] for _ in range(2)] == ["MODIFIED", "DELETED"]
        arrived = time.monotonic_ns()
        written = server.drain_traffic()
        assert written.events == 2
        assert before < written.first < written.last < arrived
        http.close()
