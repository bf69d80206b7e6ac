"""`make demo` as a program: in a pipe, on a terminal, interrupted, and without privileges."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from tests.demo.cluster import DemoCluster
from tests.demo.rules import rules_of
from tests.demo.screen import Screen, is_balanced
from tests.demo.steps import run
from tests.lab import proxy
from tests.lab.client import Outcome, Refused
from tests.lab.requirements import PACKAGES, UNPRIVILEGED, missing_access, missing_commands
from tests.lab.waiting import HANG_GUARD

DEMO = [sys.executable, "-m", "tests.demo"]
CHECKOUT = Path(__file__).parent.parent.parent
ESCAPE = "\x1b"


def run_demo(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=4 * HANG_GUARD,
        check=False,
    )


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_output_in_a_pipe_is_plain_text(kernel: None) -> None:
    done = run_demo(DEMO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ESCAPE not in done.stdout
    assert done.stderr == ""
    assert " 0 failed" in done.stdout
    assert done.stdout.count("ok: ") == 4
    for pod in ("web-a", "web-b", "web-c", "web-d"):
        assert f"   {pod}   █" in done.stdout, f"{pod} has no bar"
    assert "-A KUBE-SERVICES -d 10.96.0.80/32" in done.stdout
    assert done.stdout.count("DNAT --to-destination") == 3
    assert done.stdout.endswith("Done. The demo has cleaned up.\n")


def test_output_on_a_terminal_has_colors(kernel: None) -> None:
    terminal, pts = pty.openpty()
    with subprocess.Popen(
        DEMO, cwd=CHECKOUT, env=os.environ | {"TERM": "xterm-256color"}, stdout=pts, stdin=pts
    ) as demo:
        os.close(pts)
        output = b""
        while chunk := _read(terminal):
            output += chunk
    os.close(terminal)
    assert demo.returncode == 0, output.decode()
    assert f"{ESCAPE}[" in output.decode()
    assert " 0 failed" in output.decode()


def _read(terminal: int) -> bytes:
    """Return output from the terminal, or nothing after its last writer has closed it (EIO)."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["interrupted", "terminated", "killed"],
)
def test_nothing_remains_after_a_signal(kernel: None, tmp_path: Path, number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        DEMO,
        cwd=CHECKOUT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        for line in demo.stdout:
            if line.startswith("4. "):  # the daemon runs and the client sends requests
                break
        daemons = [os.pidfd_open(child) for child in children_of(demo.pid)]
        demo.send_signal(number)
        rest, errors = demo.stdout.read(), demo.stderr.read()
    assert demo.returncode == code, rest + errors
    assert errors == ""
    assert daemons
    for daemon in daemons:
        assert select.select([daemon], [], [], HANG_GUARD)[0], "the daemon is still running"
        os.close(daemon)
    assert list(tmp_path.iterdir()) == []
    assert "kproxy-demo" not in Path("/proc/self/mountinfo").read_text()
    if number != signal.SIGKILL:
        assert rest.endswith("Interrupted. The demo has cleaned up.\n")


def test_unprivileged_user_can_run_it(kernel: None) -> None:
    if reason := missing_access("sh", "-c", 'exec "$0" "$@"'):
        pytest.skip(reason)
    if run_demo([*UNPRIVILEGED, "unshare", "--user", "--map-root-user", "--mount", "true"]).returncode != 0:
        pytest.skip("this kernel lets only root make user namespaces")
    done = run_demo([*UNPRIVILEGED, *DEMO], PATH="/usr/bin:/bin", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout


def test_missing_permission_to_create_namespaces_is_one_line(kernel: None, tmp_path: Path) -> None:
    (tmp_path / "unshare").symlink_to("/bin/false")
    done = run_demo(DEMO, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stdout == ""
    expected = (
        "demo: root is not permitted to create namespaces: run the demo on the host or in a `--privileged` container\n"
    )
    assert done.stderr == expected


def test_missing_commands_are_reported_with_their_packages(tmp_path: Path) -> None:
    for command in PACKAGES:
        (tmp_path / command).symlink_to("/bin/true")
    assert missing_commands(str(tmp_path)) == ""
    (tmp_path / "iptables").unlink()
    (tmp_path / "mount").unlink()
    assert missing_commands(str(tmp_path)) == (
        "iptables, mount not found: install it with `apt-get install iptables mount` (as root)"
    )


def test_daemon_that_exits_is_reported_with_its_last_line(
    kernel: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "kproxy"
    broken.write_text("#!/bin/sh\necho other output >&2; echo no such flag >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(proxy, "KPROXY", str(broken))
    with DemoCluster(tmp_path) as cluster, pytest.raises(RuntimeError, match="exited with code 3: no such flag"):
        cluster.start_kproxy()


class Faulty(DemoCluster):
    """A demo cluster that loses one request."""

    lost = False

    def request(self) -> Outcome:
        if not self.lost:
            self.lost = True
            return Refused()
        return super().request()


def test_lost_request_is_reported(kernel: None, tmp_path: Path) -> None:
    output = io.StringIO()
    with Faulty(tmp_path) as cluster:
        assert not run(cluster, Screen(Console(file=output)))
    assert " 1 failed" in output.getvalue()
    assert "FAILED" in output.getvalue()
    assert "1 x Refused()" in output.getvalue()


def test_only_balanced_traffic_to_exactly_these_pods_is_accepted() -> None:
    pods = ["a", "b", "c"]
    assert is_balanced(Counter(a=60, b=100, c=140), pods)
    assert not is_balanced(Counter(a=58, b=100, c=142), pods)
    assert not is_balanced(Counter(a=100, b=100, c=58, d=42), pods)
    assert not is_balanced(Counter(a=150, b=150), pods)
    assert not is_balanced(Counter(), pods)


def test_bars_are_ascii_on_ascii_output() -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Screen(Console(file=output)).bars({"a": 3, "b": 1}, ["a", "b"])
    output.flush()
    output.seek(0)
    lines = output.read().splitlines()
    assert lines[0].split() == ["a", "#" * 30, "3", "75%"]
    assert lines[1].split() == ["b", "#" * 10, "1", "25%"]


def test_rules_of_a_service_are_selected_from_the_dump() -> None:
    dump = (CHECKOUT / "tests/golden/clusterip/iptables-save.txt").read_text()
    chains = rules_of(dump, "demo/web")
    assert [rules[0].split()[1] for rules in chains] == [
        "KUBE-SERVICES",
        "KUBE-SVC-XRY76EGRC3BSCIIJ",
        "KUBE-SEP-SELNSDJLEF35BQ4V",
        "KUBE-SEP-4R2DDHFYEWMX5YSX",
        "KUBE-SEP-X77QEHRBAUGFM3SK",
    ]
    assert sum(len(rules) for rules in chains) == 11
    assert "default/kubernetes" not in str(chains)
