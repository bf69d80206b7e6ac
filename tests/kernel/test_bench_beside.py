"""`--beside` of the benchmark: another proxy is measured beside kproxy, and nothing of a failing one is left behind."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.bench.cluster import Cluster
from tests.bench.figures import Results
from tests.bench.testbed import server_addresses
from tests.bench.throughput import missing
from tests.lab.proxy import KPROXY

CHECKOUT = Path(__file__).parents[2]
MARK = "kproxy-bench-marker-4711"


@pytest.fixture(autouse=True)
def iperf(kernel: None) -> None:
    """Skip the test without iperf3."""
    if reason := missing():
        pytest.skip(reason)


def run(folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = [f"--json={folder / 'bench.json'}", f"--chart={folder / 'bench.svg'}"]
    argv = [sys.executable, "-m", "tests.bench", "--size=tiny", "--modes=nftables", *files, *arguments]
    return subprocess.run([*argv, f"--beside={command}"], cwd=CHECKOUT, capture_output=True, text=True, check=False)


def leftovers() -> list[str]:
    """Return the command lines of processes that the test's commands started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if MARK in text:
            found.append(text)
    return found


def test_another_proxy_is_measured_beside_kproxy(tmp_path: Path) -> None:
    # A shell that stays: the figures are those of all processes.
    inner = f"{KPROXY} run --master={{master}} --proxy-mode={{mode}} --hostname-override={{hostname}} "
    inner += "--cluster-cidr={cluster_cidr} --conntrack-max-per-core=0 --conntrack-min=0; true"
    done = run(tmp_path, shlex.join(["sh", "-c", inner]))
    assert done.returncode == 0, done.stdout + done.stderr
    results = msgspec.json.decode((tmp_path / "bench.json").read_bytes(), type=Results)
    assert [(each.mode, each.services) for each in results.runs] == [("nftables", 1), ("nftables", 20)]
    for each in results.runs:
        assert all(figure.baseline and figure.baseline_is == "sh" for figure in each.figures)
        by_name = {figure.name: figure for figure in each.figures}
        assert {"first sync", "RSS at peak", "connections to VIPs", "throughput to a VIP"} <= by_name.keys()
        for kind in ("chains", "rules", "sets", "elements"):
            assert by_name[f"kernel: {kind}"].ratio == 1.0
    assert {"one endpoint", "new Service", "burst", "RSS after changes"} <= by_name.keys()
    assert by_name["RSS after first sync"].baseline is not None
    assert by_name["RSS after first sync"].baseline.value > 20  # that of Python, not of the shell
    assert "one endpoint" in done.stdout


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo cannot start >&2; exit 3", "--beside: sh exited with code 3: cannot start\n"),
        (
            f"echo waiting; (sleep 1000000; : {MARK}) & sleep 1000000; : {MARK}",
            "--beside: sh has not programmed 10.96.1.0:80 and has been idle for 0.5 s: waiting\n",
        ),
    ],
)
def test_failing_proxy_is_an_error_in_one_line_and_leaves_nothing(tmp_path: Path, script: str, error: str) -> None:
    done = run(tmp_path, shlex.join(["sh", "-c", script]), "--patience=0.5")
    assert (done.returncode, done.stderr) == (1, error)
    assert leftovers() == []


def test_proxy_that_ignores_a_change_is_an_error(tmp_path: Path) -> None:
    objects = tmp_path / "objects.json"
    items = list(Cluster(20, 10, server_addresses(10)).objects())
    objects.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items}))
    command = [KPROXY, "run", f"--objects={objects}", "--config={config}"]  # does not watch the API server
    done = run(tmp_path, shlex.join(command), "--patience=2", "--services=20")
    assert done.returncode == 1
    assert done.stderr.startswith("--beside: kproxy has made 0 of 1 expected commits and has been idle for 2 s: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("", "the command is empty"),
        ("no-such-proxy --x", "no-such-proxy: command not found"),
        ("sh {confg}", "{confg}: unknown placeholder: choose from {master}, {kubeconfig}, {config}"),
        ("sh 'x", "No closing quotation"),
    ],
)
def test_unusable_commands_are_rejected(tmp_path: Path, command: str, error: str) -> None:
    done = run(tmp_path, command)
    assert done.returncode == 2
    assert f"--beside: {error}" in done.stderr
